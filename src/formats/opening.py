"""Open the model of an evaluation, or the autoencoder of stage 2: a checkpoint, a third-party decoder file, or an export."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from src.core.errors import UserError, worded
from src.core.options import ModelOptions
from src.core.settings import check_arguments, check_keys
from src.core.text import typed
from src.core.weights import freeze
from src.formats.checkpoint import LoadedModel, existing, load_trained
from src.formats.decoder_files import kind_of, read_statistics
from src.formats.diffusers import read_diffusers
from src.formats.folder import read_folder
from src.models.encoder_presets import expand_encoder, source_key
from src.models.rae import RAE

DEFAULT_IMAGE_PX = 256


def open_model(options: ModelOptions) -> LoadedModel:
    """Return a frozen RAE on the CPU, and what is known about it.

    Raises:
        UserError: contradictory options; missing, truncated or malicious files; parts that don't fit; another image size
            than the model's.
    """
    if (options.checkpoint is None) == (options.decoder is None):
        raise UserError(
            "Give one of --checkpoint (written by training) and --decoder (a third-party decoder, or an export)."
        )
    loaded = _from_checkpoint(options) if options.checkpoint is not None else _from_decoder(options)
    rae = loaded.rae
    if options.stats is not None:
        rae.set_statistics(*read_statistics(options.stats, rae.latent_shape, rae.encoder.identity()))
    size = rae.geometry.image_size
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
    reason = "the checkpoint sets this already. Drop it; only --encoder may be given, for another path of the encoder."
    _refuse(options, ("encoder_cls", "encoder_layers"), reason)
    return load_trained(options.checkpoint, options.weights, encoder=options.encoder)


def _from_decoder(options: ModelOptions) -> LoadedModel:
    assert options.decoder is not None
    kind, place = kind_of(options.decoder, "--decoder")
    if kind is not None:
        fixed = ("encoder_cls", "encoder_layers", *(("encoder",) if kind == "diffusers" else ()))
        _refuse(options, fixed, f"the folder {place} sets this already. Drop it.")
        return read_diffusers(place) if kind == "diffusers" else read_folder(place, options.encoder)
    rae = RAE(
        **_encoder(options),
        decoder_config_path=options.decoder_config,
        decoder_patch_size=options.decoder_patch_size,
        image_size=options.image_size or DEFAULT_IMAGE_PX,
        pretrained_decoder_path=place,
        decoder_denormalize=options.decoder_output == "normalized",
    )
    freeze(rae)
    return LoadedModel.of(rae, place, rae.encoder.identity(), {"weights": "as stored"})


def _encoder(options: ModelOptions) -> dict[str, Any]:
    """Return the arguments of `RAE` for the encoder, from a preset name, or a class with a path or hub id."""
    node = {"encoder_cls": options.encoder_cls, "encoder_params": {"layers": options.encoder_layers}}
    if options.encoder_cls is not None and options.encoder is not None:
        params = {source_key(options.encoder_cls): options.encoder}
        params |= {"layers": options.encoder_layers} if options.encoder_layers else {}
        return node | {"encoder_config_path": options.encoder, "encoder_params": params}
    try:
        return expand_encoder({"encoder": options.encoder or "", **node})
    except UserError as error:
        raise UserError(
            f"A decoder file needs its encoder, but --encoder is {options.encoder}: give the name of a preset (--encoder "
            "dinov2-b; docs/encoders.md), or a class and a folder or hub id (--encoder_cls Dinov2withNorm --encoder "
            "facebook/dinov2-with-registers-base)."
        ) from error


def open_autoencoder(
    where: str | Mapping[str, Any] | None, statistics: str | None = None, image_size: int | None = None
) -> LoadedModel:
    """Return a frozen RAE with latent statistics.

    Args:
        where: a `.ckpt` or export of this trainer, or a diffusers folder; or a mapping {encoder, decoder, statistics} of
            released files, where `encoder` is a preset name, or a path or hub id together with `encoder_cls`. It may
            contain other options of `ModelOptions`.
        statistics: a statistics file, if the autoencoder has none or to replace its own.
        image_size: required image size in px; None: the autoencoder's own.

    Raises:
        UserError: files that are missing or don't fit, no statistics, another image size.
    """
    options, stats = _options_of(where)
    built = image_size if isinstance(where, Mapping) else None  # only a bare decoder file does not set its own size
    with worded({f"--{name}": f"model.autoencoder.{name}" for name in ("encoder", "decoder")}):
        loaded = open_model(ModelOptions(**{**options, "image_size": built}))
    rae = loaded.rae
    if image_size not in (None, size := rae.geometry.image_size):
        raise UserError(
            f"The autoencoder {where} works at {size} px, the transformer at {image_size} px: give an autoencoder of {image_size} "
            f"px, or train at {size} px (`image_size: {size}` of the data)."
        )
    for file, key in ((stats, "model.autoencoder.statistics"), (statistics, "model.statistics")):
        if file is not None:
            rae.set_statistics(*read_statistics(file, rae.latent_shape, rae.encoder.identity(), key))
    if not rae.has_statistics:
        raise UserError(
            f"The autoencoder {where} has no latent statistics. Make them with `python src/latent_stats.py --checkpoint CKPT "
            "--data_dir IMAGES --output stats.pt`. For training set model.statistics=stats.pt; for sample.py (and training too) "
            "export both: `python src/export.py --checkpoint CKPT --stats stats.pt --format folder --output FOLDER`."
        )
    return loaded


def _options_of(where: str | Mapping[str, Any] | None) -> tuple[dict[str, Any], str | None]:
    """Return the `ModelOptions` arguments and the statistics file given by `model.autoencoder`. Raises UserError."""
    if isinstance(where, str):
        is_checkpoint = where.endswith(".ckpt")
        _ = existing(where, "model.autoencoder") if is_checkpoint else kind_of(where, "model.autoencoder")
        return {"checkpoint" if is_checkpoint else "decoder": where}, None
    if not isinstance(where, Mapping | None):
        raise UserError(
            f"model.autoencoder={typed(where)}: expected a path, or a mapping of decoder, encoder and statistics."
        )
    options = {str(key): value for key, value in (where or {}).items()}
    keys = {"stats": "statistics"}
    check_keys(options, [keys.get(field.name, field.name) for field in fields(ModelOptions)], "model.autoencoder")
    if not isinstance(stats := options.pop("statistics", None), str | None):
        raise UserError(f"model.autoencoder.statistics={typed(stats)}: expected text or null.")
    check_arguments(ModelOptions, options, "model.autoencoder")
    decoder = options.get("decoder")
    if decoder is None:
        raise UserError(
            "model.autoencoder is not set: give a .ckpt of stage 1, the folder of an export, or "
            "released files: '{encoder: dinov2-b, decoder: model.pt, statistics: stat.pt}'."
        )
    if decoder.endswith(".ckpt") or kind_of(decoder, "model.autoencoder.decoder")[0]:
        raise UserError(
            f"model.autoencoder.decoder={decoder} already sets its encoder: set model.autoencoder={decoder} instead of a mapping."
        )
    return options, stats
