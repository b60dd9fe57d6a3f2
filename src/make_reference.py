"""Make a file to score against: Inception statistics (`mu`, `sigma`) or the images themselves (`arr_0`) of a data set.

    python src/make_reference.py --data_dir /path/to/imagenet_hf --split validation --output val256.npz
    python src/make_reference.py --data_dir /path/to/imagenet_hf --kind images --output val256_images.npz
    python src/make_reference.py --checkpoint best.ckpt --data_dir /path/to/photos --output held_out256.npz

Images are the centre crops that reconstructions are compared with. Both files go into `eval_rfid.py --reference`, and
into other tools: the first is what pytorch-fid and the like read, the second what the ADM evaluation suite reads. To
pack reconstructions for that suite use `eval_rfid.py --save_npz FILE`; a folder of generated images is a data set like
any other. Both files say how their images were prepared, and `eval_rfid.py` compares that with its own.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence

from src.core.options import (
    add_data_options,
    add_device_option,
    add_inception_options,
    make_parser,
    option,
    positive,
)
from src.core.terminal import progress, run_program


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add_data_options(parser, num_samples=None)
    add_inception_options(parser)
    add_device_option(parser)
    option(
        parser,
        "checkpoint",
        metavar="FILE",
        help="take the images, the size and --exif that `eval_rfid.py --checkpoint FILE` takes: without a validation "
        "split those that its training held out",
    )
    option(
        parser,
        "image_size",
        type=positive,
        metavar="PX",
        help="side of the centre crop (default: the checkpoint's, else 256)",
    )
    option(
        parser,
        "kind",
        choices=("statistics", "images"),
        default="statistics",
        help="what to write (default: %(default)s)",
    )
    option(parser, "output", required=True, metavar="FILE", help="the npz")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    if len(options.data_dir) > 1:
        parser.error("one reference is made of one data set; --data_dir names several")
    return run_program(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from src.core.processes import processes
    from src.evaluation.reference_file import write_reference

    with processes(options.device) as place, progress(place.main) as track:
        count, description = write_reference(options, place, track)
    if place.main:
        print(f"{options.output}: {description} of {count:,} images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
