"""Build command-line options from dataclasses: each field is an option in both spellings (`--batch_size`, `--batch-size`).

Also defines the groups of options that several scripts share. No heavy imports, so that `--help` is fast.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from inspect import get_annotations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from src.core.files import resolve
from src.core.terminal import run_program

T = TypeVar("T")

INCEPTION_FILE = "weights/pt_inception-2015-12-05-6726825d.pth"
LPIPS_FILES = {"vgg_path": "weights/vgg16-397923af.pth", "linear_path": "weights/lpips_vgg_v0.1.pth"}
LARGEST_PX = 16384
"""Largest side of an image, in px."""
EXIT_CODES = "exit codes: 0 done; 1 error, see the message; 2 wrong options; 130 interrupted"


def number(kind: type[int] | type[float], least: float, most: float, expected: str) -> Callable[[str], Any]:
    """Return an argparse type for numbers from `least` to `most`; `expected` describes them in the error message."""

    def parse(text: str) -> Any:
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it for text that is not a number
    return parse


positive = number(int, 1, 2**63 - 1, "at least 1, below 2^63")
pixels = number(int, 1, LARGEST_PX, f"1 to {LARGEST_PX} pixels")
not_negative = number(int, 0, 2**63 - 1, "0 or more, below 2^63")
above_zero = number(float, sys.float_info.min, sys.float_info.max, "a number above 0")
share = number(float, 0, 1, "a share, 0 to 1")
sigma = number(float, 0, sys.float_info.max, "a standard deviation of 0 or more")
Positive = Annotated[int, positive]
Pixels = Annotated[int, pixels]
NotNegative = Annotated[int, not_negative]
Share = Annotated[float, share]
Place = Annotated[Path, resolve]
"""A path; relative ones are relative to the project root, not to the working directory."""


def option(help: str, metavar: str | None = None, default: Any = None, **more: Any) -> Any:
    """Declare a field of an options class; `default=MISSING`: required.

    `more` is passed to `add_argument`, such as `action="append", nargs=None`; `positional=True` drops the dashes.
    """
    return field(default=default, metadata={"help": help, **({"metavar": metavar} if metavar else {}), **more})


def build_parser(options: type, description: str | None, epilog: str = EXIT_CODES) -> argparse.ArgumentParser:
    """Return a parser for the fields of a dataclass, grouped by the `GROUP` title of the class that declares each field.

    The type sets how a field is parsed: `bool` is a switch, `Literal` a choice, `tuple[X, ...]` one or more values,
    `Annotated[X, function]` is converted by the function.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    groups: dict[str | None, Any] = {None: parser}
    declared = {name: part for part in options.__mro__ for name in get_annotations(part)}  # by the most basic class
    hints = get_type_hints(options, include_extras=True)
    for entry in fields(options):
        title = vars(declared[entry.name]).get("GROUP")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        arguments = {**_arguments(hints[entry.name]), **entry.metadata}
        if entry.default not in (MISSING, None, False, ()) and "(default" not in arguments["help"]:
            arguments["help"] += f" (default: {entry.default})"
        flags = [entry.name]
        if not arguments.pop("positional", False):
            flags = list(dict.fromkeys(("--" + entry.name, "--" + entry.name.replace("_", "-"))))
            arguments["required"] = entry.default is MISSING
        groups[title].add_argument(*flags, **arguments)
    return parser


def parse(options: type[T], description: str | None, argv: Sequence[str] | None, epilog: str = EXIT_CODES) -> T:
    """Parse a command line (None: sys.argv) into `options`.

    Wrong options, and a ValueError from the class's `__post_init__`, exit with the usage and status 2.
    """
    parser, words = build_parser(options, description, epilog), sys.argv[1:] if argv is None else argv
    if empty := [place for place, word in enumerate(words) if re.fullmatch(r"(--[\w-]+=)?", word)]:
        before = " ".join(words[: empty[0] + 1])
        parser.error(f"no value after `{before.rstrip(' =')}`: is a shell variable not set?")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    try:
        return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    except ValueError as error:
        parser.error(str(error))


def run(
    options: type[T],
    description: str | None,
    body: Callable[[T], int],
    argv: Sequence[str] | None,
    epilog: str = EXIT_CODES,
) -> int:
    """Parse a command line, run `body` with the options and return the exit status (see `run_program`)."""
    given = parse(options, description, argv, epilog)
    return run_program(lambda: body(given))


def _arguments(kind: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a field's type."""
    parts = get_args(kind)
    if type(None) in parts:
        return _arguments(parts[0])
    if get_origin(kind) is Literal:
        return {"choices": parts}
    if get_origin(kind) is tuple:
        return {"nargs": "+", **_arguments(parts[0])}
    if get_origin(kind) is Annotated:
        return {"type": parts[1]}
    return {"action": "store_true"} if kind is bool else {"type": kind}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of the model, used by `src.formats.opening.open_model`."""

    GROUP: ClassVar = "model (one of --checkpoint and --decoder)"
    checkpoint: str | None = option(".ckpt of a run; includes the model's configuration", "FILE")
    weights: Literal["ema", "online"] = option("with --checkpoint: averaged (EMA) or current weights", default="ema")
    decoder: str | None = option(
        "decoder file with the official names, or an exported folder (diffusers or ours)", "PATH"
    )
    encoder: str | None = option(
        "folder or hub id of the encoder, with a decoder file also a preset (dinov2-b); with --checkpoint: another copy of the "
        "same encoder",
        "PATH",
    )
    encoder_cls: str | None = option(
        "with a decoder file, unless --encoder is a preset: Dinov2withNorm, another of docs/encoders.md or of your own package",
        "CLASS",
    )
    encoder_layers: str | None = option(
        "with a RAEv2 decoder file: k1, k7, k23 or 11.13.15 (default: the last block)", "BLOCKS"
    )
    stats: str | None = option("latent statistics, instead of the model's own", "FILE")
    decoder_config: str = option("with a decoder file: JSON or its folder", "PATH", "configs/decoder/ViTXL")
    decoder_patch_size: Pixels = option("with a decoder file", "PX", 16)
    decoder_output: Literal["normalized", "image"] = option(
        "of a decoder file: pixels normalised as for the encoder (RAE), or the image itself (RAEv2)",
        default="normalized",
    )
    image_size: Pixels | None = option("image size (default: the model's; with a decoder file 256)", "PX")


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(ModelOptions):
    """Options of one or several models."""

    decoder: tuple[str, ...] = option(  # type: ignore[assignment]
        "decoder files with the official names, exported folders (diffusers or ours) or .ckpt files; a row for each",
        "PATH",
        (),
    )

    def models(self) -> list[ModelOptions]:
        """Return the options of each model."""
        common = {entry.name: getattr(self, entry.name) for entry in fields(ModelOptions)}
        kinds = [{"checkpoint": self.checkpoint}] if self.checkpoint else []
        kinds += [{"checkpoint" if path.endswith(".ckpt") else "decoder": path} for path in self.decoder]
        return [ModelOptions(**{**common, "checkpoint": None, "decoder": None, **kind}) for kind in kinds]


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """Options of image loading and the device, used by `evaluation_loader` and `processes`."""

    GROUP: ClassVar = "images and device"
    device: str = option("cuda, cuda:N or cpu", "NAME", "cuda")
    num_samples: Positive | None = option("only N images (default: all)", "N")
    batch_size: Positive = option("images at once in each process", "N", 64)
    num_workers: NotNegative = option("data-loading workers", "N", 4)
    max_bad_share: Share = option("stop if a larger share of the images can't be decoded", "SHARE", 0.01)


@dataclass(frozen=True, kw_only=True)
class DataOptions(LoadingOptions):
    """Options of the images to evaluate on, used by `src.evaluation.images.open_images`."""

    GROUP: ClassVar = "images and device"
    data_dir: tuple[str, ...] = option(
        "Hugging Face dataset on disk or tree of image files; several are scored one after the other", "DIR", MISSING
    )
    split: str | None = option(
        "a split, `held_out` or `all` (default: validation, else what training held out, else all)", "NAME"
    )
    exif: Literal["apply", "ignore"] | None = option(
        "apply: turn images as their EXIF says; ignore: as published references (default: the checkpoint's data.exif, else "
        "apply)"
    )


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Options of the feature networks, used by `src.evaluation.networks.networks_of`."""

    GROUP: ClassVar = "feature networks"
    features: tuple[str, ...] = option(
        "inception, or dinov2 (ViT-L/14; DIR: its local folder): a Frechet distance for each (default: inception)",
        "NAME[=DIR]",
        ("inception",),
    )
    inception_path: str | None = option(
        f"FID weights (default: the checkpoint's callbacks.rfid.inception_path, else {INCEPTION_FILE})", "FILE"
    )
    inception_weights: Literal["pretrained", "untrained", "tiny"] = option(
        "untrained, or tiny (an eighth of the channels, untrained): to test without the file; the score is not rFID",
        default="pretrained",
    )
    inception_width: Annotated[float, above_zero] | None = option(
        "deprecated: with untrained weights, any width but 1 means tiny", "SHARE"
    )


@dataclass(frozen=True, kw_only=True)
class LpipsOptions:
    """Files of LPIPS, used by `src.evaluation.networks.lpips_of`."""

    GROUP: ClassVar = "feature networks"
    vgg_path: str | None = option(
        f"VGG16 for LPIPS (default: the checkpoint's, else {LPIPS_FILES['vgg_path']})", "FILE"
    )
    lpips_path: str | None = option(
        f"linear weights of LPIPS (default: the checkpoint's, else {LPIPS_FILES['linear_path']})", "FILE"
    )
