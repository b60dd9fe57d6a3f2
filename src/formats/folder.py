"""Write and read our own self-contained folder format: a complete model in safetensors and JSON.

    config.json          format, sizes, encoder (identity, and its path or hub id), preprocessing
    model.safetensors    decoder.*, and latent_mean, latent_var if the model has statistics
    encoder/             only `with_encoder`: the encoder as saved by transformers (or timm)

Legend: C latent channels, h = w latent grid.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from src.core.errors import UserError
from src.core.files import write_safetensors
from src.core.json_files import read_json
from src.core.weights import freeze, load_strict, read
from src.formats.checkpoint import LoadedModel, stored
from src.formats.decoder_files import (
    FOLDER_FORMAT,
    FOLDER_VERSION,
    FOLDER_WEIGHTS,
    read_folder_config,
    read_record,
    statistics_problem,
)  # fmt: skip
from src.formats.diffusers_layout import WEIGHTS
from src.models.encoder_presets import source_key
from src.models.encoders import encoder_name
from src.models.frozen_encoder import is_untrained, require_same_encoder
from src.models.rae import RAE

log = logging.getLogger(__name__)

ENCODER = "encoder"
_STATISTICS = ("latent_mean", "latent_var")


def write_folder(
    loaded: LoadedModel, folder: str | Path, dtype: torch.dtype = torch.float32, with_encoder: bool = False
) -> list[str]:
    """Write the model into an existing folder; return remarks for its users.

    Args:
        dtype: of the decoder and the encoder; statistics stay float32.
    """
    rae, folder = loaded.rae, Path(folder)
    params = _encoder_params(loaded, with_encoder)
    config = {
        "format": FOLDER_FORMAT,
        "format_version": FOLDER_VERSION,
        "model": {
            "encoder_cls": encoder_name(rae.encoder),
            "encoder_params": params,
            "image_size": rae.geometry.image_size,
            "decoder_patch_size": rae.geometry.decoder_patch,
            "decoder_denormalize": rae.decoder_denormalize,
            "train_positions": rae.decoder.decoder_pos_embed.requires_grad,
            "noise_tau": rae.noise_tau,
        },
        "decoder": vars(rae.decoder.config),
        "encoder": loaded.description["encoder"],
        "image_mean": rae.image_mean.flatten().tolist(),
        "image_std": rae.image_std.flatten().tolist(),
    }
    state = {
        f"decoder.{name}": value.detach().to(dtype).cpu().contiguous()
        for name, value in rae.decoder.state_dict().items()
    }
    state |= {name: value.cpu() for name in _STATISTICS if (value := getattr(rae, name)) is not None}
    write_safetensors(folder / FOLDER_WEIGHTS, state, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if with_encoder:
        _write_encoder(rae, folder / ENCODER, dtype)
        return []
    place = rae.encoder.source
    return [f"The encoder is not in this folder: it is loaded from {place} and compared with the one used in training."]


def read_folder(folder: str | Path, encoder: str | None = None) -> LoadedModel:
    """Load a frozen RAE from a folder written by `write_folder`.

    Args:
        encoder: path or hub id of the encoder, if not the stored one. Must be the same encoder.

    Raises:
        UserError: damaged or incomplete files, no encoder, or another one than in training.
    """
    folder = Path(folder)
    config = read_folder_config(folder)
    model, identity = config["model"], config["encoder"]
    key, inside = source_key(model["encoder_cls"]), folder / ENCODER
    place = encoder or model["encoder_params"].get(key) or str(inside)
    params = model["encoder_params"] | {key: place}
    state = read(folder / FOLDER_WEIGHTS)
    rae = RAE(
        encoder_config_path=place, encoder_params=params, decoder_config_path=config["decoder"],
        **{name: value for name, value in model.items() if name != "encoder_params"},
    )  # fmt: skip
    decoder = {name.removeprefix("decoder."): value for name, value in state.items() if name not in _STATISTICS}
    load_strict(rae.decoder, decoder, folder)
    if statistics := {name: state[name] for name in _STATISTICS if name in state}:
        mean, var = (statistics.get(name) for name in _STATISTICS)
        if problem := statistics_problem(mean, var, rae.latent_shape):
            raise UserError(f"{folder}: {problem} The folder is damaged.")
        rae.set_statistics(mean, var)
    for name in ("image_mean", "image_std"):
        getattr(rae, name).copy_(torch.tensor(config[name]).view(1, 3, 1, 1))
    rae.encoder.untrained = is_untrained(identity)
    if not (place == str(inside) and _was_rounded(inside)):
        require_same_encoder(rae.encoder, identity, folder)
    if rae.encoder.untrained:
        log.warning("%s: its encoder is UNTRAINED: random weights, not a result.", folder)
    freeze(rae)
    return LoadedModel.of(rae, folder, identity, read_record(folder))


def _encoder_params(loaded: LoadedModel, with_encoder: bool) -> dict[str, Any]:
    """Return the arguments of the encoder class; the path is null if the folder contains the encoder."""
    encoder = loaded.rae.encoder
    given = stored(loaded.description, "config.model.encoder_params") or loaded.description.get("encoder_params") or {}
    left_out = ("weights", "seed") if with_encoder else ()
    params = {name: value for name, value in given.items() if name not in left_out}
    if not with_encoder and Path(encoder.source, WEIGHTS).is_file():
        raise UserError("This model's encoder exists only inside a diffusers folder: export with --with_encoder.")
    place = None if with_encoder else encoder.source
    chosen = {"layers": list(encoder.layers), "layer_fusion": encoder.layer_fusion}
    return params | {source_key(type(encoder).__name__): place, **chosen}


def _write_encoder(rae: RAE, folder: Path, dtype: torch.dtype) -> None:
    disable_progress_bar()  # transformers shows one even for a single shard
    rae.encoder.save(folder, dtype)
    means = {"image_mean": rae.image_mean.flatten().tolist(), "image_std": rae.image_std.flatten().tolist()}
    (folder / "preprocessor_config.json").write_text(json.dumps(means) + "\n")


def _was_rounded(inside: Path) -> bool:
    """Return whether the encoder in the folder was rounded to half precision, so that its digest can't match."""
    dtype = read_json(inside / "config.json").get("dtype")
    if dtype in (None, "float32") and all(v.dtype == torch.float32 for v in read(inside / FOLDER_WEIGHTS).values()):
        return False
    log.info("%s: the encoder is stored in half precision; it is not compared with the one used in training.", inside)
    return True
