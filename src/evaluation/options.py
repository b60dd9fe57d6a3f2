"""The options of the evaluation programs (the shared ones: `src/core/options.py`). No heavy imports."""

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from src.core.options import (
    DataOptions,
    DeviceOptions,
    InceptionOptions,
    LoadingOptions,
    LpipsOptions,
    ModelOptions,
    NotNegative,
    Positive,
    option,
)


def sigma(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a standard deviation of 0 or more")
    return value


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What `src/eval_rfid.py` writes."""

    GROUP: ClassVar = "output"
    output_dir: str | None = option(
        "save originals and reconstructions as PNG, and a sheet with their differences", "DIR"
    )
    save_samples_count: NotNegative = option("pairs in --output_dir", "N", default=64)
    worst: NotNegative = option("sheet of the K worst (by LPIPS, else PSNR) as --output_dir/worst.png", "K", default=0)
    json: str | None = option("all numbers, and all they depend on", "FILE")
    csv: str | None = option("PSNR, SSIM and LPIPS of each image", "FILE")
    save_npz: str | None = option(
        "reconstructions as `arr_0` (uint8 N x H x W x 3) for the ADM evaluation suite", "FILE"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(OutputOptions, LpipsOptions, DeviceOptions, InceptionOptions, DataOptions, ModelOptions):
    """`src/eval_rfid.py`."""

    num_samples: Positive = option("images, the first ones of a fixed mixed order", "N", default=10000)
    precision: Literal["32", "16", "bf16"] = option(
        "of encoder and decoder, whatever training used; 16 on a CPU is bf16", default="32"
    )
    quantization: Literal["round", "truncate"] | None = option(
        "to 8 bits; truncate is what the official code does (default: the checkpoint's callbacks.rfid.quantization, "
        "else round)"
    )
    reference: tuple[str, ...] = option(
        "score against `mu` and `sigma`, or the images `arr_0`, of a file instead of the originals; one for all data "
        "sets or one for each. Another image size is refused, another preparation is warned of",
        "NPZ",
        default=(),
    )
    noise_sigma: tuple[Annotated[float, sigma], ...] = option(
        "standard deviations of noise on the latents, before their normalisation: a row for each (default: 0)",
        "S",
        default=(0.0,),
    )
    layers: tuple[str, ...] = option(
        "blocks of the encoder to decode from, k1, k7, k23 or numbers such as 11.13.15: a row for each (default: the "
        "model's own)",
        "BLOCKS",
        default=(),
    )

    def __post_init__(self) -> None:
        if self.worst and self.output_dir is None:
            raise ValueError("--worst needs --output_dir: the sheet goes there")
        if self.save_npz and len(self.data_dir) > 1:
            raise ValueError("--save_npz takes the images of one data set, --data_dir names several")


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions(DeviceOptions, InceptionOptions, DataOptions):
    """`src/make_reference.py`."""

    checkpoint: str | None = option(
        "take the images, the size and --exif that `eval_rfid.py --checkpoint FILE` takes: without a validation split "
        "those that its training held out",
        "FILE",
    )
    image_size: Positive | None = option("side of the centre crop (default: the checkpoint's, else 256)", "PX")
    kind: Literal["statistics", "images"] = option("what to write", default="statistics")
    output: str = option("the npz", "FILE", default=MISSING)

    def __post_init__(self) -> None:
        if len(self.data_dir) > 1:
            raise ValueError("one reference is made of one data set; --data_dir names several")


@dataclass(frozen=True, kw_only=True)
class InputOptions(LoadingOptions):
    """What `src/reconstruct.py` takes."""

    GROUP: ClassVar = "images"
    input: tuple[str, ...] = option(
        "image files, folders, patterns in quotes, or one data set on disk (this or --from_latents)", "PATH", default=()
    )
    from_latents: str | None = option("decode latents that --latents stored", "DIR")
    split: str | None = option("of a data set (default: all of its training split)", "NAME")
    fit: Literal["crop", "pad", "resize"] = option("how an image becomes a square", default="crop")
    exif: Literal["apply", "ignore"] = option("turn images as their EXIF says", default="apply")
    batch_size: Positive = option("images at once and process", "N", default=32)
    max_bad_share: float = option("stop when more of the images can't be decoded", "SHARE", default=1.0)


@dataclass(frozen=True, kw_only=True)
class ProductOptions(LpipsOptions):
    """What `src/reconstruct.py` writes."""

    GROUP: ClassVar = "output"
    output: Path = option("a new folder", "DIR", default=MISSING)
    overwrite: bool = option("replace what an earlier call left in --output", default=False)
    write: tuple[Literal["images", "sheet", "scores", "npz"], ...] = option(
        "images: PNG files; sheet: originals, reconstructions, differences; scores: PSNR, SSIM and LPIPS of each image "
        "as CSV; npz: reconstructions and originals for FID programs (default: images sheet scores, nothing with "
        "--latents)",
        "WHAT",
        default=(),
    )
    sheet_images: Positive = option("on the sheet", "N", default=32)
    latents: Literal["raw", "normalized"] | None = option(
        "store latents as the encoder gives them, or normalised by the model's statistics"
    )
    latents_dtype: Literal["fp32", "bf16", "fp16"] = option("of stored latents", default="fp32")


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions(DeviceOptions, ProductOptions, InputOptions, ModelOptions):
    """`src/reconstruct.py`."""

    def __post_init__(self) -> None:
        if bool(self.input) == bool(self.from_latents):
            raise ValueError("give one of --input and --from_latents")
        if self.from_latents and (self.latents or "scores" in self.write):
            raise ValueError("--from_latents has no originals: neither --latents nor --write scores goes with it")

    @property
    def products(self) -> frozenset[str]:
        """What of `write` is made, by default too."""
        usual = () if self.latents else ("images", "sheet", *(() if self.from_latents else ("scores",)))
        return frozenset(self.write or usual)


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions(DeviceOptions, LoadingOptions):
    """`src/latent_stats.py`."""

    config: tuple[str, ...] = option(
        "overrides as for src/train.py, experiment=NAME first; data.data_dir and its split count too (one of --config, "
        "--checkpoint and --decoder)",
        "KEY=VALUE",
        default=(),
    )
    checkpoint: str | None = option(".ckpt that training wrote", "FILE")
    decoder: str | None = option("exported folder (ours or diffusers)", "DIR")
    encoder: str | None = option("with --checkpoint: where the same encoder lies on this machine", "PATH")
    data_dir: str | None = option(
        "Hugging Face dataset on disk or a tree of image files (default: data.data_dir of --config or of the "
        "checkpoint)",
        "DIR",
    )
    split: str = option("a split by its name, or `all` of the training split", "NAME", default="all")
    exif: Literal["apply", "ignore"] = option("as in training", default="apply")
    output: Path = option("the statistics, .pt", "FILE", default=MISSING)
    overwrite: bool = option("replace an existing --output", default=False)

    def __post_init__(self) -> None:
        if sum(map(bool, (self.config, self.checkpoint, self.decoder))) != 1:
            raise ValueError("give one of --config, --checkpoint and --decoder")
