"""Open the model of an evaluation: a checkpoint of ours, a decoder file of others, or an exported folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from src.core.errors import UserError
from src.core.options import ModelOptions
from src.core.weights import freeze, read
from src.formats.checkpoint import LoadedModel, existing, load_trained
from src.formats.decoder_files import kind_of
from src.formats.diffusers import read_diffusers
from src.formats.folder import read_folder
from src.models.encoder_presets import expand_encoder
from src.models.rae import RAE, SOURCE_KEYS

DEFAULT_IMAGE_PX = 256


def open_model(options: ModelOptions) -> LoadedModel:
    """Return a frozen RAE on the CPU, and what is known of it.

    Raises:
        UserError: contradicting options; missing, cut short or hostile files; parts that don't fit; another image size
            than the model's.
    """
    if (options.checkpoint is None) == (options.decoder is None):
        raise UserError(
            "Give one of --checkpoint (what training wrote) and --decoder (a decoder of others, or an export)."
        )
    loaded = _from_checkpoint(options) if options.checkpoint is not None else _from_decoder(options)
    size = loaded.rae.geometry.image_size
    if options.image_size not in (None, size):
        raise UserError(
            f"--image_size {options.image_size}, but the model of {loaded.description['source']} works at {size} px. "
            f"Drop the option, or give a model of {options.image_size} px."
        )
    return loaded


def _refuse(options: ModelOptions, names: Sequence[str], reason: str) -> None:
    surplus = [name for name in names if getattr(options, name) is not None]
    if surplus:
        raise UserError(f"--{', --'.join(surplus)}: {reason}")


def _from_checkpoint(options: ModelOptions) -> LoadedModel:
    assert options.checkpoint is not None
    reason = "a checkpoint says that itself. Drop it; --encoder may say where the encoder lies."
    _refuse(options, ("encoder_cls", "encoder_layers", "stats"), reason)
    changes: dict[str, Any] = {}
    if options.encoder is not None:
        content = read(existing(options.checkpoint))
        params = _model_config(content).get("encoder_params") or {}
        key = next((key for key in SOURCE_KEYS if key in params), SOURCE_KEYS[-1])
        changes = {"encoder_config_path": options.encoder, "encoder_params": {**params, key: options.encoder}}
    return load_trained(options.checkpoint, options.weights, changes)


def _from_decoder(options: ModelOptions) -> LoadedModel:
    assert options.decoder is not None
    kind, place = kind_of(options.decoder, "--decoder")
    if kind is not None:
        said = ("encoder_cls", "encoder_layers", "stats", *(("encoder",) if kind == "diffusers" else ()))
        _refuse(options, said, f"the folder {place} says that itself. Drop it.")
        return read_diffusers(place) if kind == "diffusers" else read_folder(place, options.encoder)
    rae = RAE(
        **_encoder(options),
        decoder_config_path=options.decoder_config,
        decoder_patch_size=options.decoder_patch_size,
        image_size=options.image_size or DEFAULT_IMAGE_PX,
        pretrained_decoder_path=place,
        normalization_stat_path=options.stats,
        decoder_denormalize=options.decoder_output == "normalized",
    )
    freeze(rae)
    unknown = {"step": None, "epoch": None, "config": None}
    return LoadedModel(
        rae, {"source": str(place), "weights": "as stored", "encoder": rae.encoder.identity(), **unknown}
    )


def _encoder(options: ModelOptions) -> dict[str, Any]:
    """Return the arguments of `RAE` for the encoder: a preset's name, or a class and a place."""
    node = {"encoder_cls": options.encoder_cls, "encoder_params": {"layers": options.encoder_layers}}
    if options.encoder_cls is not None and options.encoder is not None:
        key = "dinov2_path" if options.encoder_cls == "Dinov2withNorm" else "model_name"
        params = {key: options.encoder, **({"layers": options.encoder_layers} if options.encoder_layers else {})}
        return node | {"encoder_config_path": options.encoder, "encoder_params": params}
    try:
        return expand_encoder({"encoder": options.encoder or "", **node})
    except UserError as error:
        raise UserError(
            f"A decoder file needs its encoder, and --encoder is {options.encoder}: give the name of a preset (--encoder "
            "dinov2-b; docs/encoders.md), or class and place (--encoder_cls Dinov2withNorm --encoder "
            "facebook/dinov2-with-registers-base)."
        ) from error


def run_config(checkpoint: str) -> Mapping[str, Any]:
    """Return the configuration of the run that wrote `checkpoint`. UserError where there is none."""
    file = existing(checkpoint)
    content = read(file)
    if not _model_config(content):
        raise UserError(
            f"{file} is no checkpoint of this trainer. Expected a .ckpt from the checkpoints/ folder of a run. Without "
            "one drop --checkpoint and say --split, --image_size and --exif."
        )
    config: Mapping[str, Any] = content["config"]
    return config


def _model_config(content: Any) -> Mapping[str, Any]:
    """Return the node `model:`; empty where this is no checkpoint of ours: whoever loads it says so."""
    config = content.get("config") if isinstance(content, Mapping) else None
    return (config.get("model") or {}) if isinstance(config, Mapping) else {}
