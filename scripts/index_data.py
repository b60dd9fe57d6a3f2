"""Index tar files, on disk or in object storage, ahead of training. Otherwise the first run does this when it starts.

python scripts/index_data.py /path/to/tars
python scripts/index_data.py s3://bucket/imagenet --option endpoint_url=http://127.0.0.1:9000
"""

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from src.core.errors import UserError, worded
from src.core.options import option, run


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the indexing."""

    data_dir: str = option("as data.data_dir: a folder, a pattern or an address", None, MISSING, positional=True)
    label: str | None = option("as data.label: cls or json:KEY", "LABEL")
    option: tuple[str, ...] = option(
        "as data.storage_options, as often as needed; keys and secrets belong in the environment",
        "KEY=VALUE",
        (),
        action="append",
        nargs=None,
    )

    def __post_init__(self) -> None:
        if odd := [text for text in self.option if "=" not in text]:
            raise ValueError(f"--option {odd[0]}: expected KEY=VALUE")


def main() -> int:
    return run(Options, __doc__, index, None)


def index(options: Options) -> int:
    from src.data.places import locate, look
    from src.data.sources import ReadOptions

    storage = dict(text.split("=", 1) for text in options.option) or None
    with worded({"data.data_dir": "data_dir"}):
        place = look(locate(options.data_dir), ReadOptions(label=options.label, storage=storage))
    if place.kind not in ("tars", "remote"):
        raise UserError(f"{options.data_dir} is a {place.kind}: only tars need an index.")
    for split in place.splits:
        source = place.open(split)
        state = "made" if source.index_built else "there already"  # type: ignore[attr-defined]
        print(f"{split}: {len(source):,} images, index {state}: {source.index_path}")  # type: ignore[attr-defined]
    return 0


if __name__ == "__main__":
    sys.exit(main())
