"""Options that the evaluation programs share, in both spellings (`--batch_size`, `--batch-size`). Light imports."""

import argparse
from typing import Any

INCEPTION_FILE = "weights/pt_inception-2015-12-05-6726825d.pth"
EXIT_CODES = "exit codes: 0 done; 1 something is wrong with what was given; 2 wrong options; 130 interrupted"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def option(group: Any, name: str, **arguments: Any) -> None:
    """`--a_b` and `--a-b` of a parser or of one of its groups."""
    group.add_argument(*dict.fromkeys(("--" + name, "--" + name.replace("_", "-"))), **arguments)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Read by `src.formats.opening.open_model`."""
    model = parser.add_argument_group("model (one of --checkpoint and --decoder)")
    option(model, "checkpoint", metavar="FILE", help=".ckpt that training wrote; it says everything about the model")
    option(
        model,
        "weights",
        choices=("ema", "online"),
        default="ema",
        help="of a checkpoint: averaged weights or the optimiser's (default: %(default)s)",
    )
    option(
        model,
        "decoder",
        metavar="PATH",
        help="decoder file with the official names, or an exported folder (diffusers AutoencoderRAE, or ours)",
    )
    option(
        model,
        "encoder",
        metavar="PATH",
        help="folder or hub id of the encoder; with --checkpoint: where the same encoder lies on this machine",
    )
    option(
        model,
        "encoder_cls",
        metavar="CLASS",
        help="with a decoder file: Dinov2withNorm, SigLIP2wNorm, MAEwNorm or DINOv3wNorm",
    )
    option(
        model,
        "encoder_layers",
        metavar="BLOCKS",
        help="with a decoder file of RAEv2: k1, k7, k23 or numbers such as 11.13.15 (default: the last block)",
    )
    option(model, "stats", metavar="FILE", help="with a decoder file: its latent statistics")
    option(
        model,
        "decoder_config",
        metavar="PATH",
        default="configs/decoder/ViTXL",
        help="with a decoder file: JSON or its folder (default: %(default)s)",
    )
    option(
        model,
        "decoder_patch_size",
        type=positive,
        default=16,
        metavar="PX",
        help="with a decoder file (default: %(default)s)",
    )
    option(
        model,
        "decoder_output",
        choices=("normalized", "image"),
        default="normalized",
        help="with a decoder file: in the encoder's normalised pixel space (RAE), or the image itself (RAEv2) "
        "(default: %(default)s)",
    )
    option(
        model,
        "image_size",
        type=positive,
        metavar="PX",
        help="comes from the model; with a decoder file 256 if not given",
    )


def add_data_options(parser: argparse.ArgumentParser, num_samples: int | None) -> None:
    """Read by `src.evaluation.images.open_images` and `evaluation_loader`."""
    data = parser.add_argument_group("images")
    option(
        data,
        "data_dir",
        nargs="+",
        required=True,
        metavar="DIR",
        help="Hugging Face dataset on disk (with splits or without) or a tree of image files; several are scored one "
        "after the other",
    )
    option(
        data,
        "split",
        metavar="NAME",
        help="a split by its name, `held_out` (what training held out of the set) or `all` (default: validation, "
        "else what training held out, else all)",
    )
    option(
        data,
        "num_samples",
        type=positive,
        default=num_samples,
        metavar="N",
        help="images, the first ones of a fixed mixed order (default: %(default)s)"
        if num_samples
        else "images (default: all)",
    )
    option(data, "batch_size", type=positive, default=64, metavar="N", help="images at once (default: %(default)s)")
    option(
        data, "num_workers", type=not_negative, default=4, metavar="N", help="loading processes (default: %(default)s)"
    )
    option(
        data,
        "exif",
        choices=("apply", "ignore"),
        help="turn images as their EXIF says, or take them as stored like published references (default: the "
        "checkpoint's data.exif, else apply)",
    )
    option(
        data,
        "max_bad_share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop when more of the images can't be decoded (default: %(default)s)",
    )


def add_inception_options(parser: argparse.ArgumentParser) -> None:
    inception = parser.add_argument_group("Inception network")
    option(
        inception,
        "inception_path",
        metavar="FILE",
        help=f"FID weights (default: the checkpoint's callbacks.rfid.inception_path, else {INCEPTION_FILE})",
    )
    option(
        inception,
        "inception_weights",
        choices=("pretrained", "untrained"),
        default="pretrained",
        help="untrained: for a try-out without the file; the score is then not called rFID (default: %(default)s)",
    )
    option(
        inception,
        "inception_width",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the channels; below 1 with untrained weights only (default: %(default)s)",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    option(parser, "device", default="cuda", metavar="NAME", help="cuda, cuda:N or cpu (default: %(default)s)")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def not_negative(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return value
