"""Convert images, Parquet or tar files to a Hugging Face dataset on disk, or create the small one that the tests use.

    python scripts/create_hf_test_data.py --input_dir IMAGES --output_dir DATASET
    python scripts/create_hf_test_data.py                 creates data/test_hf (20 images)

IMAGES has one folder per class, or `train` and `val` folders that have one folder per class; or it contains Parquet files
from the Hugging Face hub, or tar files. Relative paths start at the working directory. The bytes of the images are copied.
Files that are not intact images are left out, and listed at the end and in DATASET/conversion_report.json. To resume an
interrupted conversion, run the same command again.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])

from src.core.options import Positive, above_zero, option, parse
from src.core.terminal import progress, run_program

SHOWN_BAD = 20
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the conversion."""

    input_dir: Path | None = option("folder of images, Parquet or tar files", "DIR")
    output_dir: Path | None = option("folder of the new dataset", "DIR")
    resize_shorter: Positive | None = option(
        "store training images with the shorter side at PX (384 suits 256 px training): re-encoded as JPEG of quality 95, "
        "EXIF rotation applied, smaller ones enlarged. Faster to load. A validation split is still copied unchanged, so that "
        "rFID is measured against the original files",
        "PX",
    )
    num_workers: Positive = option("processes (default: one per core)", "N", CORES)
    max_megapixels: Annotated[float, above_zero] = option("leave out larger images, judged by their header", "MP", 80.0)
    overwrite: bool = option(
        "replace an existing dataset at DATASET, once the new one is complete; a folder that is no dataset, or that shares "
        "files with IMAGES, is never replaced",
        default=False,
    )
    trust: bool = option(
        "don't decode every image to find damaged ones; training replaces and logs those. For Parquet and tar files from a "
        "checked source; several times as fast",
        default=False,
    )
    dummy: bool = option("also create data/dummy_dataset_hf (288 images)", default=False)

    def __post_init__(self) -> None:
        if (self.input_dir is None) != (self.output_dir is None):
            raise ValueError("--input_dir and --output_dir go together (with neither, data/test_hf is created)")


def main() -> int:
    options = parse(Options, __doc__, None)
    return run_program(lambda: convert(options) if options.input_dir else make_own(options.dummy, options.overwrite))


def make_own(with_dummy: bool, overwrite: bool) -> int:
    """Create the project's own small data sets."""
    import shutil

    from src.core import files
    from src.data import dummy
    from src.data.convert import check_output

    for place in ["data/test_hf"] + (["data/dummy_dataset_hf"] if with_dummy else []):
        folder = files.PROJECT_ROOT / place
        if overwrite and folder.exists():
            check_output(folder, overwrite)
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder)
        made = dummy.ensure(folder)
        print(f"{place}: {dummy.DATASETS[place][0]} images {'created' if made else 'exist already'}")
    return 0


def convert(options: Options) -> int:
    """Convert, and print a summary."""
    from src.core.errors import worded
    from src.core.files import expanded
    from src.data.convert import REPORT
    from src.data.convert import convert as run
    from src.data.convert_scan import scan
    from src.data.convert_shard import Settings

    assert options.input_dir is not None and options.output_dir is not None
    with worded({"data.data_dir": "--input_dir"}):
        tree, output = scan(expanded(options.input_dir).resolve()), expanded(options.output_dir).resolve()
    settings = Settings(options.resize_shorter, options.max_megapixels, options.trust)
    with progress("files converted") as update:
        report = run(
            tree, output, settings, options.num_workers, options.overwrite, lambda done: update(done, tree.count)
        )
    counts = ", ".join(f"{count} images ({split})" for split, count in report.images.items())
    print(f"{output}: {counts}, {report.classes} classes, {report.seconds} s")
    if report.shards_reused:
        print(f"Resumed an interrupted conversion: {report.shards_reused} shards were done.")
    if report.bad:
        print(f"{len(report.bad)} left out (all of them in {output / REPORT}):")
        for entry in report.bad[:SHOWN_BAD]:
            print(f"  {entry['file']}: {entry['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
