"""Score reconstructions: rFID, PSNR, SSIM and LPIPS of a trained model, a released decoder or an exported folder.

python src/eval_rfid.py --checkpoint logs/runs/DATE/TIME/checkpoints/best.ckpt --data_dir /path/to/imagenet_hf
torchrun --nproc_per_node=8 src/eval_rfid.py …                       several processes, the same number
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from typing import Any

from src.core.options import (
    add_data_options,
    add_device_option,
    add_inception_options,
    add_model_options,
    make_parser,
    not_negative,
    option,
)
from src.core.terminal import progress, run_program

EPILOG = r"""
the published figures of the released DINOv2-B decoder (rFID .57, PSNR 18.9 dB on the 50,000 images of ImageNet val):

    python scripts/download_weights.py inception vgg16 lpips decoder-dinov2 stats-dinov2 \
        facebook/dinov2-with-registers-base
    python src/eval_rfid.py \
        --decoder weights/decoders/dinov2/wReg_base/ViTXL_n08/model.pt --decoder_config configs/decoder/ViTXL \
        --encoder_cls Dinov2withNorm --encoder facebook/dinov2-with-registers-base \
        --stats weights/stats/dinov2/wReg_base/imagenet1k/stat.pt \
        --data_dir /path/to/imagenet_hf --split validation --num_samples 50000 --image_size 256 \
        --exif ignore --quantization truncate

with our own defaults (EXIF rotation applied, 8-bit values rounded) the numbers differ a little; compare like with like.
A checkpoint is scored as its training scored it: --exif and --quantization are those of its configuration.
A DDP run of N processes, or another batch size, gives the same number up to float32 rounding of the features.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.epilog = f"{EPILOG}\n{parser.epilog}"
    add_model_options(parser)
    add_data_options(parser, num_samples=10000)
    add_inception_options(parser)
    add_device_option(parser)
    option(
        parser,
        "precision",
        choices=("32", "16", "bf16"),
        default="32",
        help="of encoder and decoder, whatever training used; 16 on a CPU is bf16 (default: %(default)s)",
    )
    option(
        parser,
        "quantization",
        choices=("round", "truncate"),
        help="to 8 bits; truncate is what the official code does (default: the checkpoint's "
        "callbacks.rfid.quantization, else round)",
    )
    option(
        parser,
        "reference",
        nargs="+",
        metavar="NPZ",
        help="score against `mu` and `sigma`, or the images `arr_0`, of a file instead of the originals; one for all "
        "data sets or one for each. Another image size is refused, another preparation is warned of",
    )
    option(
        parser,
        "noise_sigma",
        nargs="+",
        type=_sigma,
        default=[0.0],
        metavar="S",
        help="standard deviations of noise on the latents, before their normalisation: a row for each (default: 0)",
    )
    option(
        parser,
        "layers",
        nargs="+",
        metavar="BLOCKS",
        help="blocks of the encoder to decode from, k1, k7, k23 or numbers such as 11.13.15: a row for each "
        "(default: the model's own)",
    )
    option(
        parser,
        "vgg_path",
        metavar="FILE",
        help="VGG16 for LPIPS (default: the checkpoint's, else weights/vgg16-397923af.pth)",
    )
    option(
        parser,
        "lpips_path",
        metavar="FILE",
        help="linear weights of LPIPS (default: the checkpoint's, else weights/lpips_vgg_v0.1.pth)",
    )
    output = parser.add_argument_group("output")
    option(
        output,
        "output_dir",
        metavar="DIR",
        help="save originals and reconstructions as PNG, and a sheet with their differences",
    )
    option(
        output,
        "save_samples_count",
        type=not_negative,
        default=64,
        metavar="N",
        help="pairs in --output_dir (default: %(default)s)",
    )
    option(
        output,
        "worst",
        type=not_negative,
        default=0,
        metavar="K",
        help="sheet of the K worst (by LPIPS, else PSNR) as --output_dir/worst.png",
    )
    option(output, "json", metavar="FILE", help="all numbers, and all they depend on")
    option(output, "csv", metavar="FILE", help="PSNR, SSIM and LPIPS of each image")
    option(
        output,
        "save_npz",
        metavar="FILE",
        help="reconstructions as `arr_0` (uint8 N x H x W x 3) for the ADM evaluation suite",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.worst and options.output_dir is None:
        parser.error("--worst needs --output_dir: the sheet goes there")
    if options.save_npz and len(options.data_dir) > 1:
        parser.error("--save_npz takes the images of one data set, --data_dir names several")
    return run_program(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from src.core.processes import processes
    from src.evaluation.report import text, write_json
    from src.evaluation.rfid import Evaluation, output_folders, references

    results: list[dict[str, Any]] = []
    folders = output_folders(options.output_dir, options.data_dir)
    files = references(options.reference, options.data_dir)
    with processes(options.device) as place, Evaluation(options, place) as evaluation:
        # before the first long pass, what is wrong is said
        sets = [evaluation.open(data_dir) for data_dir in options.data_dir]
        moments = [evaluation.reference(images, file) for images, file in zip(sets, files, strict=True)]
        with progress(place.main) as track:
            for images, reference, folder in zip(sets, moments, folders, strict=True):
                loader = evaluation.loader(images)
                results += evaluation.score(images, track(loader, len(loader), images.folder.name), reference, folder)
        protocol = evaluation.protocol
    if results:
        print(text(results))
        if options.output_dir:
            print(f"Sample images saved to: {options.output_dir}")
        if options.json:
            command = [Path(sys.argv[0]).name, *sys.argv[1:]]
            write_json(options.json, {"command": command, **protocol, "results": results})
        for file in filter(None, (options.json, options.csv, options.save_npz)):
            print(f"Written: {file}")
    return 0


def _sigma(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a standard deviation of 0 or more")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
