"""Turn images, Parquet or tar files into a Hugging Face dataset on disk, or make the small one that the tests use.

    python scripts/create_hf_test_data.py --input_dir IMAGES --output_dir DATASET
    python scripts/create_hf_test_data.py                 makes data/test_hf (20 pictures)

IMAGES has one folder per class, or `train` and `val` folders with such classes below; or it holds Parquet files as the
Hugging Face hub has them, or tar files. Relative paths are those of the working directory. The bytes of the images are
copied. Files that are no whole images are left out, listed at the end and in DATASET/conversion_report.json. A run that
was interrupted goes on where it stopped when the same command is given again.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

SHOWN_BAD = 20


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit codes: 0 done; 1 something is wrong with what was given; 2 wrong options; 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input_dir", "--input-dir", type=Path, help="folder of images, Parquet or tar files")
    parser.add_argument("--output_dir", "--output-dir", type=Path, help="where the dataset goes")
    parser.add_argument(
        "--resize_shorter",
        "--resize-shorter",
        type=int,
        metavar="PX",
        help="store training images with the shorter side at PX (384 suits 256 px training): re-encoded as JPEG of "
        "quality 95, EXIF rotation applied, smaller ones enlarged. Loads faster. A validation split is still copied "
        "unchanged, so that rFID is measured against the original files",
    )
    parser.add_argument(
        "--num_workers",
        "--num-workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per core, here %(default)s)",
    )
    parser.add_argument(
        "--max_megapixels",
        "--max-megapixels",
        type=float,
        default=80.0,
        metavar="MP",
        help="leave out larger images, by their header alone (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing dataset at DATASET, once the new one is complete; a folder that is no dataset, or "
        "that shares files with IMAGES, is never replaced",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="don't decode every image to find the damaged ones: training replaces and names them. For Parquet and tars "
        "of a source that was checked; several times as fast",
    )
    parser.add_argument("--dummy", action="store_true", help="make data/dummy_dataset_hf as well (288 pictures)")
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    if (args.input_dir is None) != (args.output_dir is None):
        parser.error("--input_dir and --output_dir go together (neither: make data/test_hf)")
    if args.resize_shorter is not None and args.resize_shorter < 1:
        parser.error("--resize_shorter: expected a positive number of px")
    if args.num_workers < 1:
        parser.error("--num_workers: expected at least 1")
    from src.core.errors import UserError

    try:
        return make_own(args.dummy, args.overwrite) if args.input_dir is None else convert(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130


def make_own(with_dummy: bool, overwrite: bool) -> int:
    """Make the project's own small data sets."""
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
        print(f"{place}: {dummy.DATASETS[place][0]} pictures {'made' if made else 'are there already'}")
    return 0


def convert(args: argparse.Namespace) -> int:
    from src.core.terminal import progress
    from src.data.convert import REPORT
    from src.data.convert import convert as run
    from src.data.convert_scan import scan
    from src.data.convert_shard import Settings

    tree, output = scan(args.input_dir.expanduser().resolve()), args.output_dir.expanduser().resolve()
    settings = Settings(args.resize_shorter, args.max_megapixels, args.trust)
    with progress("files converted") as update:
        report = run(tree, output, settings, args.num_workers, args.overwrite, lambda done: update(done, tree.count))
    counts = ", ".join(f"{count} images ({split})" for split, count in report.images.items())
    print(f"{output}: {counts}, {report.classes} classes, {report.seconds} s")
    if report.shards_reused:
        print(f"Went on from an interrupted run: {report.shards_reused} shards were there already.")
    if report.bad:
        print(f"{len(report.bad)} left out (all of them in {output / REPORT}):")
        for entry in report.bad[:SHOWN_BAD]:
            print(f"  {entry['file']}: {entry['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
