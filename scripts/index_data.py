"""Index tar files, on the disk or in object storage, before training: what the first run would do at its start.

python scripts/index_data.py /path/to/tars
python scripts/index_data.py s3://bucket/imagenet --option endpoint_url=http://127.0.0.1:9000
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def build_parser() -> argparse.ArgumentParser:
    from src.core.options import EXIT_CODES

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", help="what data.data_dir says: a folder, a pattern, an address")
    parser.add_argument("--label", metavar="LABEL", help="as data.label: cls or json:KEY")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as data.storage_options, as often as needed; keys and secrets belong into the environment",
    )
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    odd = [text for text in args.option if "=" not in text]
    if odd:
        parser.error(f"--option {odd[0]}: expected KEY=VALUE")
    from src.core.errors import UserError
    from src.data.places import locate, look
    from src.data.read_options import ReadOptions

    options = ReadOptions(label=args.label, storage=dict(text.split("=", 1) for text in args.option) or None)
    try:
        place = look(locate(args.data_dir), options)
        if place.kind not in ("tars", "remote"):
            raise UserError(f"{args.data_dir} is a {place.kind}: only tars need an index.")
        for split in place.splits:
            source = place.open(split)
            state = "made" if source.index_built else "there already"  # type: ignore[attr-defined]
            print(f"{split}: {len(source):,} images, index {state}: {source.index_path}")  # type: ignore[attr-defined]
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
