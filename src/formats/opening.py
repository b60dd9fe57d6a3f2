"""The model of an evaluation: from a checkpoint of ours, a decoder file of others, or an exported folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from src.core.errors import UserError
from src.core.weights import freeze, read, require, resolve
from src.formats.checkpoint import LoadedModel, load_trained
from src.formats.decoder_files import kind_of
from src.formats.diffusers import read_diffusers
from src.formats.folder import read_folder
from src.models.rae import RAE, SOURCE_KEYS

DEFAULT_IMAGE_PX = 256


@dataclass(frozen=True)
class ModelChoice:
    """What `add_model_options` asks for, checked for contradictions."""

    checkpoint: str | None
    weights: Literal["ema", "online"]
    decoder: str | None
    encoder: str | None
    encoder_cls: str | None
    encoder_layers: str | None
    stats: str | None
    decoder_config: str
    decoder_patch_size: int
    decoder_output: Literal["normalized", "image"]
    image_size: int | None

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.decoder is None):
            raise UserError(
                "Give one of --checkpoint (what training wrote) and --decoder (a decoder of others, or an export)."
            )
        surplus = [
            name
            for name in ("encoder_cls", "encoder_layers", "stats")
            if self.checkpoint is not None and getattr(self, name) is not None
        ]
        if surplus:
            raise UserError(
                f"--{', --'.join(surplus)}: a checkpoint says that itself. Drop it; --encoder may say where the "
                "encoder lies."
            )

    @classmethod
    def of(cls, arguments: Any) -> Self:
        """From an argparse namespace."""
        return cls(**{name: getattr(arguments, name) for name in cls.__dataclass_fields__})


def open_model(choice: ModelChoice) -> LoadedModel:
    """A frozen RAE on the CPU, and what is known of it.

    Raises:
        UserError: missing, cut short or hostile files; parts that don't fit; another image size than the model's.
    """
    loaded = _from_checkpoint(choice) if choice.checkpoint is not None else _from_decoder(choice)
    size = loaded.rae.geometry.image_size
    if choice.image_size not in (None, size):
        raise UserError(
            f"--image_size {choice.image_size}, but the model of {loaded.description['source']} works at {size} px. "
            "Drop the option, "
            f"or give a model of {choice.image_size} px."
        )
    return loaded


def _from_checkpoint(choice: ModelChoice) -> LoadedModel:
    assert choice.checkpoint is not None
    changes: dict[str, Any] = {}
    if choice.encoder is not None:
        content = read(require(choice.checkpoint, "Checkpoint", "--checkpoint"))
        params = _model_config(content).get("encoder_params") or {}
        key = next((key for key in SOURCE_KEYS if key in params), SOURCE_KEYS[-1])
        changes = {"encoder_config_path": choice.encoder, "encoder_params": {**params, key: choice.encoder}}
    return load_trained(choice.checkpoint, choice.weights, changes)


def _from_decoder(choice: ModelChoice) -> LoadedModel:
    assert choice.decoder is not None
    kind, place = kind_of(choice.decoder, "--decoder")
    if kind is not None:
        said = ("encoder_cls", "encoder_layers", "stats", *(("encoder",) if kind == "diffusers" else ()))
        surplus = [name for name in said if getattr(choice, name) is not None]
        if surplus:
            raise UserError(f"--{', --'.join(surplus)}: the folder {place} says that itself. Drop it.")
        return read_diffusers(place) if kind == "diffusers" else read_folder(place, choice.encoder)
    if choice.encoder_cls is None or choice.encoder is None:
        raise UserError(
            "A decoder file needs its encoder: --encoder_cls Dinov2withNorm --encoder "
            "facebook/dinov2-with-registers-base, say."
        )
    key = "dinov2_path" if choice.encoder_cls == "Dinov2withNorm" else "model_name"
    params: dict[str, Any] = {key: choice.encoder}
    if choice.encoder_layers is not None:
        params["layers"] = choice.encoder_layers
    rae = RAE(
        encoder_cls=choice.encoder_cls,
        encoder_config_path=choice.encoder,
        encoder_params=params,
        decoder_config_path=choice.decoder_config,
        decoder_patch_size=choice.decoder_patch_size,
        image_size=choice.image_size or DEFAULT_IMAGE_PX,
        pretrained_decoder_path=place,
        normalization_stat_path=choice.stats,
        decoder_denormalize=choice.decoder_output == "normalized",
    )
    freeze(rae)
    unknown = {"step": None, "epoch": None, "config": None}
    return LoadedModel(
        rae, {"source": str(place), "weights": "as stored", "encoder": rae.encoder.identity(), **unknown}
    )


def run_config(checkpoint: str) -> Mapping[str, Any]:
    """The configuration of the run that wrote `checkpoint`. UserError where there is none."""
    file = resolve(checkpoint)
    if not file.is_file():
        raise UserError(
            f"Checkpoint not found: {file} (from --checkpoint). Checkpoints lie in logs/runs/DATE/TIME/checkpoints."
        )
    content = read(file)
    if not _model_config(content):
        raise UserError(
            f"{file} is no checkpoint of this trainer. Expected a .ckpt from the checkpoints/ folder of a run. Without "
            "one drop --checkpoint and say --split, --image_size and --exif."
        )
    config: Mapping[str, Any] = content["config"]
    return config


def _model_config(content: Any) -> Mapping[str, Any]:
    """Empty where this is no checkpoint of ours; whoever loads it says so."""
    config = content.get("config") if isinstance(content, Mapping) else None
    return (config.get("model") or {}) if isinstance(config, Mapping) else {}
