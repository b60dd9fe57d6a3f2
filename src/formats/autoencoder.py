"""Open the autoencoder of a stage-2 model: whatever stage 1 leaves, or released files by name."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from src.core.errors import UserError
from src.core.options import ModelOptions
from src.core.settings import check_keys
from src.formats.checkpoint import LoadedModel, existing
from src.formats.decoder_files import kind_of
from src.formats.opening import open_model
from src.models.rae import read_statistics


def open_autoencoder(
    where: str | Mapping[str, Any] | None, statistics: str | None = None, image_size: int | None = None
) -> LoadedModel:
    """Return a frozen RAE with latent statistics.

    Args:
        where: a `.ckpt` or an export of this trainer, a diffusers folder; or a mapping {encoder, decoder, statistics} of
            released files, `encoder` a preset's name, or a place with `encoder_cls` beside it. Other options of
            `ModelOptions` may stand in it.
        statistics: a file, where the autoencoder has none or others are wanted.
        image_size: px that its images must have; None: its own.

    Raises:
        UserError: files that are missing or don't fit, no statistics, another image size.
    """
    decoder = where.get("decoder") if isinstance(where, Mapping) else where
    if decoder is None:
        raise UserError(
            "model.autoencoder is not set: give a .ckpt of stage 1, the folder of an export, or "
            "released files: '{encoder: dinov2-b, decoder: model.pt, statistics: stat.pt}'."
        )
    if decoder is not where and (str(decoder).endswith(".ckpt") or kind_of(decoder, "model.autoencoder.decoder")[0]):
        raise UserError(
            f"model.autoencoder.decoder={decoder} says its encoder itself: set model.autoencoder={decoder} instead of a mapping."
        )
    if isinstance(where, str):
        is_checkpoint = where.endswith(".ckpt")
        _ = existing(where, "model.autoencoder") if is_checkpoint else kind_of(where, "model.autoencoder")
        choice: dict[str, Any] = {"checkpoint" if is_checkpoint else "decoder": where}
    else:
        known = {"stats": "statistics"}
        check_keys(where, [known.get(field.name, field.name) for field in fields(ModelOptions)], "model.autoencoder")
        choice = {("stats" if key == "statistics" else str(key)): value for key, value in where.items()}
    loaded = open_model(ModelOptions(**{**choice, "image_size": image_size}))
    rae = loaded.rae
    if statistics is not None:
        rae.set_statistics(*read_statistics(statistics, rae.latent_shape, rae.encoder.identity()))
    if not rae.has_statistics:
        raise UserError(
            f"The autoencoder {where} has no latent statistics. Make them with `python src/latent_stats.py --checkpoint CKPT "
            "--data_dir IMAGES --output stats.pt` and set model.statistics=stats.pt."
        )
    return loaded
