"""Options of the evaluation scripts (shared ones: `src/core/options.py`). No heavy imports, so that `--help` is quick."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Literal

from src.core import options as shared
from src.core.options import NotNegative, Positive, option


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(shared.LpipsOptions, shared.FeatureOptions, shared.DataOptions, shared.ModelsOptions):
    """Options of `src/eval_rfid.py`."""

    num_samples: Positive = option("number of images, the first in a fixed shuffled order", "N", 10000)
    precision: Literal["32", "16", "bf16"] = option(
        "precision of encoder and decoder, whatever training used; 16 on a CPU is bf16", default="32"
    )
    quantization: Literal["round", "truncate"] | None = option(
        "conversion to 8 bits; the official code truncates (default: the checkpoint's callbacks.rfid.quantization, else round)"
    )
    reference: tuple[str, ...] = option(
        "score against `mu` and `sigma`, or the images `arr_0`, of a file instead of the originals; one for all data "
        "sets or one for each. Another image size is an error, another preparation a warning",
        "NPZ",
        (),
    )
    noise_sigma: tuple[Annotated[float, shared.sigma], ...] = option(
        "standard deviations of noise on the latents before normalisation, a row for each (default: 0)", "S", (0.0,)
    )
    layers: tuple[str, ...] = option(
        "blocks to decode from, such as k1, k7, k23 or 11.13.15, a row for each (default: the model's)", "BLOCKS", ()
    )
    output_dir: str | None = option("save originals, reconstructions and a sheet of their differences as PNG", "DIR")
    save_samples_count: NotNegative = option("number of image pairs in --output_dir", "N", 64)
    worst: NotNegative = option("save a sheet of the K worst (by LPIPS, else PSNR) as --output_dir/worst.png", "K", 0)
    json: str | None = option("write all numbers, and everything they depend on", "FILE")
    csv: str | None = option("write PSNR, SSIM and LPIPS of each image", "FILE")
    save_npz: str | None = option("write reconstructions as `arr_0` (uint8 N x H x W x 3) for the ADM suite", "FILE")
    report_card: str | None = option(
        "compare the models side by side: a table, all numbers, a sheet with a row for each", "DIR"
    )
    latents: str | None = option(
        "generated latents (from `sample.py --latents`, or a store): also compute each model's gFID on them", "NPZ|DIR"
    )
    generation_reference: str | None = option(
        "with --latents: reference of the generated images, as for eval_generation.py --reference", "NPZ|DIR"
    )

    def __post_init__(self) -> None:
        if (self.latents is None) != (self.generation_reference is None):
            raise ValueError("--latents and --generation_reference go together")
        if self.save_npz and len(self.models()) > 1:
            raise ValueError("--save_npz takes the reconstructions of one model, but several are given")
        if self.worst and self.output_dir is None:
            raise ValueError("--worst needs --output_dir: the sheet goes there")
        if self.save_npz and len(self.data_dir) > 1:
            raise ValueError("--save_npz takes the images of one data set, but --data_dir names several")


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions(shared.FeatureOptions, shared.DataOptions):
    """Options of `src/make_reference.py`."""

    checkpoint: str | None = option(
        "use the images (held-out ones too), size and --exif that `eval_rfid.py --checkpoint FILE` uses", "FILE"
    )
    image_size: shared.Pixels | None = option("side of the centre crop (default: the checkpoint's, else 256)", "PX")
    kind: Literal["statistics", "images"] = option("what to write", default="statistics")
    output: str = option("the npz to write", "FILE", MISSING)

    def __post_init__(self) -> None:
        if len(self.data_dir) > 1:
            raise ValueError("one reference is made from one data set, but --data_dir names several")
        if len(self.features) > 1:
            raise ValueError("one reference holds the statistics of one feature network, but --features names several")


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions(shared.LpipsOptions, shared.LoadingOptions, shared.ModelOptions):
    """Options of `src/reconstruct.py`."""

    input: tuple[str, ...] = option(
        "image files, folders, patterns in quotes, or one data set on disk (or --from_latents)", "PATH", ()
    )
    from_latents: str | None = option("decode latents that --latents stored", "DIR")
    split: str | None = option("split of a data set (default: its whole training split)", "NAME")
    fit: Literal["crop", "pad", "resize"] = option("how to make an image square", default="crop")
    exif: Literal["apply", "ignore"] = option("EXIF orientation of the images", default="apply")
    batch_size: Positive = option("images at once in each process", "N", 32)
    max_bad_share: shared.Share = option("stop if a larger share of the images can't be decoded", "SHARE", 1.0)
    output: shared.Place = option("a new folder", "DIR", MISSING)
    overwrite: bool = option("replace what an earlier call left in --output", default=False)
    write: tuple[Literal["images", "sheet", "scores", "npz"], ...] = option(
        "images: PNG files; sheet: originals, reconstructions, differences; scores: PSNR, SSIM and LPIPS of each image "
        "as CSV; npz: reconstructions and originals for FID tools (default: images sheet scores, nothing with "
        "--latents)",
        "WHAT",
        (),
    )
    sheet_images: Positive = option("number of images on the sheet", "N", 32)
    latents: Literal["raw", "normalized"] | None = option(
        "store latents as the encoder outputs them, or normalised by the model's statistics"
    )
    latents_dtype: Literal["fp32", "bf16", "fp16"] = option("precision of stored latents", default="fp32")

    def __post_init__(self) -> None:
        if bool(self.input) == bool(self.from_latents):
            raise ValueError("give one of --input and --from_latents")
        if self.from_latents and (self.latents or "scores" in self.write or self.num_samples or self.split):
            raise ValueError(
                "--from_latents decodes all of a store and has no originals: --latents, --write scores, --num_samples and "
                "--split don't go with it"
            )

    @property
    def products(self) -> frozenset[str]:
        """Return the outputs to write: those of --write, else the default ones."""
        usual = () if self.latents else ("images", "sheet", *(() if self.from_latents else ("scores",)))
        return frozenset(self.write or usual)


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions(shared.LoadingOptions):
    """Options of `src/latent_stats.py`."""

    config: tuple[str, ...] = option(
        "overrides as for src/train.py, experiment=NAME first (one of --config, --checkpoint and --decoder)",
        "KEY=VALUE",
        (),
    )
    checkpoint: str | None = option(".ckpt of a run", "FILE")
    decoder: str | None = option("exported folder (ours or diffusers)", "DIR")
    encoder: str | None = option("with --checkpoint: another copy of the same encoder", "PATH")
    data_dir: str | None = option(
        "Hugging Face dataset on disk or tree of image files (default: data.data_dir of the run)", "DIR"
    )
    split: str = option("name of a split, or `all` for the whole training split", "NAME", "all")
    exif: Literal["apply", "ignore"] = option("EXIF orientation, as in training", default="apply")
    output: shared.Place = option("the .pt file to write", "FILE", MISSING)
    overwrite: bool = option("replace an existing --output", default=False)

    def __post_init__(self) -> None:
        if sum(map(bool, (self.config, self.checkpoint, self.decoder))) != 1:
            raise ValueError("give one of --config, --checkpoint and --decoder")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(shared.FeatureOptions, shared.LoadingOptions, shared.ModelsOptions):
    """Options of `src/eval_generation.py`."""

    samples: str | None = option("generated images: `arr_0` of an npz, or a folder", "NPZ|DIR")
    latents: str | None = option(
        "instead of --samples: generated latents (from `sample.py --latents`, or a store), with models to decode them",
        "NPZ|DIR",
    )
    quantization: Literal["round", "truncate"] = option("conversion of decoded latents to 8 bits", default="round")
    reference: str = option(
        "npz with `mu`, `sigma`, `mu_s`, `sigma_s` and images `arr_0` (ADM's has all; fewer give fewer scores), or a data "
        "set on disk",
        "NPZ|DIR",
        MISSING,
    )
    reference_split: str | None = option("split of a data set, or `all` (default: as eval_rfid.py --split)", "NAME")
    exif: Literal["apply", "ignore"] = option("EXIF orientation of the images of a data set", default="apply")
    json: str | None = option("write all numbers, and everything they depend on", "FILE")

    def __post_init__(self) -> None:
        if bool(self.samples) == bool(self.latents):
            raise ValueError("give one of --samples and --latents")
        if self.samples and (self.decoder or self.checkpoint):
            raise ValueError("--samples are images already; --decoder and --checkpoint go with --latents")
        if self.reference_split and self.reference.endswith(".npz"):
            raise ValueError("--reference_split goes with a data set, and --reference is an npz")
        if self.latents and not (self.decoder or self.checkpoint):
            raise ValueError("--latents need models to decode them: --decoder A B ..., or --checkpoint")


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of `src/sample.py`."""

    checkpoint: str = option(".ckpt of a stage-2 run, or a file of the official code", "FILE", MISSING)
    model: str | None = option("experiment that fits an official file (ditdh_xl, dit_xl, raev2_dit_k7, ...)", "NAME")
    autoencoder: str | None = option(
        "a .ckpt, an export, or a mapping like '{decoder: model.pt, encoder_cls: ...}' (default: as in training)",
        "PATH",
    )
    guide: str | None = option("weaker model for autoguidance, with --auto", "FILE")
    guide_model: str | None = option("experiment that fits an official file at --guide", "NAME")
    device: str = option("cuda, cuda:N or cpu", "NAME", "cuda")
    num_images: shared.Positive = option("number of images", "N", 50_000)
    labels: str = option("equal (each class equally often), random, null, or classes such as 207,360", "WHICH", "equal")
    seed: shared.NotNegative = option("seed of noise and labels", "N", 0)
    batch_size: shared.Positive = option("images per block, the unit of work and of resuming", "N", 64)
    decode_batch: shared.Positive = option("images decoded at once", "N", 16)
    precision: Literal["fp32", "bf16"] = option(
        "precision of the transformer; published scores use fp32 with TF32 matmuls, as here on a GPU", default="fp32"
    )
    steps: shared.Positive | None = option("points (rae) or steps (raev2) (default: as in training)", "N")
    time_grid: Literal["rae", "raev2"] | None = option(
        "rae ends at t = 0.001, raev2 at 0, before the time shift (default: as in training)"
    )
    method: Literal["euler", "heun", "dopri5"] | None = option("solver (default: as in training)")
    cfg: tuple[float, ...] = option("scales of classifier-free guidance, one file for each; 1: none", "SCALE", ())
    interval: tuple[str, ...] = option("times at which guidance is used, one file for each interval", "T_MIN:T_MAX", ())
    internal: float | None = option("scale of internal guidance, for models with a base head", "SCALE")
    auto: float | None = option("scale of autoguidance by --guide", "SCALE")
    output: shared.Place = option("the .npz file to write", "FILE", MISSING)
    latents: shared.Place | None = option("also write the normalised latents to this .npz", "FILE")
    grid: shared.Place | None = option("also write a PNG with a row of images for each of 8 classes", "FILE")
    overwrite: bool = option("replace an existing or half-made --output", default=False)

    def __post_init__(self) -> None:
        if (self.guide is None) != (self.auto is None):
            raise ValueError("--guide and --auto go together")
        if self.guide_model is not None and self.guide is None:
            raise ValueError("--guide_model needs --guide")
        for name, path in self.files().items():
            if path.suffix != (suffix := ".png" if name == "grid" else ".npz"):
                raise ValueError(f"--{name} {path}: expected a name that ends in {suffix}")
        for name in ("internal", "auto"):
            if (value := getattr(self, name)) is not None and not value >= 1:
                raise ValueError(f"--{name} {value:g}: expected at least 1")

    def files(self) -> dict[str, Path]:
        """Return the output files by option name."""
        named = {"output": self.output, "latents": self.latents, "grid": self.grid}
        return {name: path for name, path in named.items() if path is not None}
