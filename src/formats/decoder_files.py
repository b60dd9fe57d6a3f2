"""Read decoder weights and latent statistics in any of the four supported forms.

    official      a state dict with the published names (`model.pt`); an official training checkpoint (its `ema`)
    checkpoint    .ckpt of this trainer (its averaged decoder)
    folder        our own format, from `src/export.py --format folder`
    diffusers     an `AutoencoderRAE` folder

Our decoder uses the official parameter names; the name table for diffusers is in `diffusers_layout`.

Legend: C latent channels, h = w latent grid.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from src.core.errors import UserError
from src.core.geometry import Pixels
from src.core.json_files import read_json
from src.core.key_mapping import below, unwrapped
from src.core.settings import Settings
from src.core.weights import load_strict, read, require, resolve
from src.formats import diffusers_layout
from src.formats.checkpoint import check_parts
from src.models.decoder import ViTDecoder, fit_positions, sincos_positions
from src.models.frozen_encoder import identity_differences

log = logging.getLogger(__name__)

Kind = Literal["official", "checkpoint", "folder", "diffusers"]
FOLDER_FORMAT = "rae-trainer"
FOLDER_VERSION = 1
FOLDER_WEIGHTS = "model.safetensors"
RECORD = "rae_export.json"
"""In every export: the record of where it comes from. Optional when reading."""
STATISTICS = "stats.pt"
"""In every export of a model with latent statistics: these, in the official format."""
_POSITIONS = "decoder_pos_embed"
_STATES = ("ema", "state_dict", "model_state_dict", "model", "decoder")
"""Keys of the state dict in third-party files, by priority; official training checkpoints use `ema`."""


@dataclass(frozen=True)
class DecoderFile:
    """A decoder with our parameter names, in its stored dtype."""

    path: Path
    kind: Kind
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None
    """Keys of `DecoderConfig` if the file contains them: shapes don't show the number of heads."""
    denormalize: bool | None = None
    encoder: dict[str, Any] = field(default_factory=dict)
    """Identity of the encoder that it was trained with; empty if unknown."""


def kind_of(path: str | Path, key: str) -> tuple[Kind | None, Path]:
    """Return the kind of a folder, and the folder; also for a file inside an export. (None, file) for any other file.

    Raises:
        UserError: no such path, or a folder of another kind. `key` is the config key or option it is from.
    """
    place = resolve(path)
    known = (FOLDER_WEIGHTS, diffusers_layout.WEIGHTS, "config.json")
    if place.name in known and (place.parent / "config.json").is_file():
        place = place.parent
    if not place.is_dir():
        return None, require(path, "Decoder, export or checkpoint", key)
    config = read_json(place / "config.json") if (place / "config.json").is_file() else {}
    if config.get("_class_name") == diffusers_layout.CLASS:
        return "diffusers", place
    if config.get("format") == FOLDER_FORMAT:
        if config.get("format_version") != FOLDER_VERSION:
            raise UserError(
                f"{place}: format_version is {config.get('format_version')}, this release reads {FOLDER_VERSION}."
            )
        return "folder", place
    found = config.get("_class_name") or config.get("model_type") or "no config.json of either kind"
    raise UserError(
        f"{key}={path} is a folder with {found}. Expected a decoder file (.pt, .ckpt, .safetensors), a folder written by "
        f"`src/export.py --format folder`, or a diffusers {diffusers_layout.CLASS} folder."
    )


def read_decoder(path: str | Path) -> DecoderFile:
    """Read a decoder in any of the four forms.

    Raises:
        UserError: missing, unreadable or truncated, or not a decoder.
    """
    kind, place = kind_of(path, "model.pretrained_decoder_path")
    if kind == "diffusers":
        return _from_diffusers(place)
    if kind == "folder":
        config = read_folder_config(place)
        state = below(read(place / FOLDER_WEIGHTS), "decoder.")
        denormalize = config["model"]["decoder_denormalize"]
        return DecoderFile(place, "folder", state, config["decoder"], denormalize, config["encoder"])
    content = read(place)
    if _is_checkpoint(content):
        check_parts(content, place)
        arch = content.get("architecture", {})
        state, sizes = below(content["state_dict"], "ema_decoder."), below(arch, "decoder config: ")
        return DecoderFile(place, "checkpoint", state, sizes, arch.get("model.decoder_denormalize"), content["encoder"])
    return DecoderFile(place, "official", _official(content, place))


def load_decoder(decoder: ViTDecoder, path: str | Path, denormalize: bool, encoder: Mapping[str, Any]) -> None:
    """Load a decoder in any form into `decoder`, strictly. `fit_positions` adapts the positions to another grid.

    Args:
        denormalize: `decoder_denormalize` of the model; must agree with the file, if that contains it.
        encoder: identity of the model's encoder; another one only causes a warning, since fine-tuning may intend it.
    """
    file = read_decoder(path)
    own = vars(decoder.config)
    stored = file.config or own
    differing = [f"{key}: file {stored.get(key)!r}, model {own[key]!r}" for key in own if stored.get(key) != own[key]]
    if file.denormalize not in (None, denormalize):
        differing.append(f"decoder_denormalize: file {file.denormalize}, model {denormalize}")
    if differing:
        raise UserError(
            f"{file.path} holds another decoder ({'; '.join(differing)}). Set model.decoder_config_path and the "
            "keys listed here to match."
        )
    differing = identity_differences(file.encoder, encoder) if file.encoder else []
    if differing:
        log.warning(
            "%s was trained with another encoder (%s): %s there, %s here.",
            file.path, ", ".join(differing), file.encoder, dict(encoder),
        )  # fmt: skip
    state = file.state
    if _POSITIONS in state:
        state = state | {_POSITIONS: fit_positions(state[_POSITIONS], decoder.grid, str(file.path))}
    load_strict(decoder, state, file.path)
    log.info("Decoder from %s (%s).", file.path, file.kind)


def read_statistics(
    path: str | Path,
    shape: tuple[int, int, int],
    identity: Mapping[str, Any],
    key: str = "model.normalization_stat_path",
) -> tuple[Tensor | None, Tensor | None]:
    """Return `mean` and `var` (None: missing) from a statistics file in the official format, an export or a checkpoint. `key`:
    the config key or option that `path` is from.

    Raises:
        UserError: both are missing, their shape is not `shape`, they are complex or not finite, the variance is negative or
            all zero, or they were made with another encoder than `identity`.
    """
    file = resolve(path)
    if file.is_dir():
        kind, file = kind_of(path, key)
        if (file / STATISTICS).is_file():
            file = file / STATISTICS
            content = read(file)
        else:
            weights = read(file / diffusers_layout.WEIGHTS) if kind == "diffusers" else {}
            content = dict(zip(("mean", "var"), diffusers_layout.statistics(weights, file) or (), strict=False))
    else:
        file = require(path, "Latent statistics", key)
        content = read(file)
        if _is_checkpoint(content):
            check_parts(content, file)
            state, encoder = content["state_dict"], content["encoder"]
            content = {"mean": state.get("rae.latent_mean"), "var": state.get("rae.latent_var"), "encoder": encoder}
    mean, var = (content.get("mean"), content.get("var")) if isinstance(content, Mapping) else (None, None)
    if mean is None and var is None:
        found = type(content).__name__
        if isinstance(content, Mapping):
            found = f"values of {sorted(str(name) for name, value in content.items() if value is not None)[:8]}"
        raise UserError(
            f"{file} has no latent statistics: expected a dictionary with `mean` and `var`, found {found}. Set {key} to a "
            "file that `python src/latent_stats.py` wrote, or to null."
        )
    if problem := statistics_problem(mean, var, shape):
        raise UserError(f"{file}: {problem} Use statistics of this encoder and size (`python src/latent_stats.py`).")
    if var is None:
        log.warning("%s has no `var`: latents keep their scale, only `mean` is subtracted.", file)
    if differing := identity_differences(stored := content.get("encoder") or identity, identity):
        differing = [f"{name}: file {stored.get(name)!r}, model {identity[name]!r}" for name in differing]
        raise UserError(
            f"{file} was made with another encoder ({'; '.join(differing)}). Compute its own with `python src/latent_stats.py`."
        )
    return mean, var


def statistics_problem(mean: Any, var: Any, shape: tuple[int, int, int]) -> str | None:
    """Return what is wrong with statistics for latents of `shape` (C, h, w); None if they are valid."""
    for name, tensor in (("mean", mean), ("var", var)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            return f"`{name}` is {got}; this model's latents are {shape} (C x h x w)."
        if tensor.is_complex() or not torch.isfinite(tensor).all():
            return f"`{name}` holds numbers that are complex, NaN or infinite."
    if var is not None and ((var < 0).any() or not var.any()):
        return f"`var` is {'zero everywhere' if not var.any() else f'negative (smallest: {var.min().item():g})'}."
    return None


class FolderModel(Settings):
    """Arguments of `RAE` in `config.json` of our folder format."""

    encoder_cls: str
    encoder_params: dict[str, Any]
    image_size: Pixels
    decoder_patch_size: Pixels
    decoder_denormalize: bool
    train_positions: bool
    noise_tau: float = Field(ge=0)


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Return the checked `config.json` of a folder in our format."""
    remedy = "It is damaged or not from `src/export.py --format folder`."
    rgb = Annotated[list[float], Field(min_length=3, max_length=3)]
    schema = {"model": FolderModel, "decoder": dict, "encoder": dict, "image_mean": rgb, "image_std": rgb}
    return read_json(folder / "config.json", remedy, **schema)


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record that `src/export.py` wrote into the folder of an export; empty for third-party folders."""
    if not (folder / RECORD).is_file():
        return {}
    optional = (dict[str, Any] | None, None)
    listed = (list[dict[str, Any]] | None, None)
    return read_json(folder / RECORD, encoder=optional, config=optional, run=optional, scores=listed, files=optional)


def _from_diffusers(folder: Path) -> DecoderFile:
    config = diffusers_layout.read_config(folder)
    weights = below(read(folder / diffusers_layout.WEIGHTS), "decoder.")
    state = {diffusers_layout.DECODER.ours(name): value for name, value in weights.items()}
    state[_POSITIONS] = sincos_positions(config["decoder_hidden_size"], diffusers_layout.grid(config))[None]
    encoder = read_record(folder).get("encoder") or {}
    return DecoderFile(folder, "diffusers", state, diffusers_layout.decoder_config(config), True, encoder)


def _is_checkpoint(content: Any) -> bool:
    return isinstance(content, Mapping) and {"format_version", "state_dict"} <= content.keys()


def _official(content: Any, file: Path) -> dict[str, Tensor]:
    """Return the state dict of a decoder with the official names, however it is wrapped; the averaged one if there are two."""
    if isinstance(content, Mapping) and {"mean", "var"} <= content.keys():
        raise UserError(
            f"{file} holds latent statistics, not a decoder: give it as model.normalization_stat_path (--stats)."
        )
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}; expected a state dict of a decoder.")
    while key := next((key for key in (*_STATES, *content) if _holds_decoder(content.get(key))), None):
        log.info("%s: using the weights under %r.", file, key)
        content = content[key]
    state = unwrapped(content)
    if any(name.startswith("decoder.decoder_layers.") for name in state):
        state = below(state, "decoder.")
    if not any(name.startswith("decoder_layers.") for name in state):
        names = ", ".join(sorted(state)[:6])
        raise UserError(f"{file} holds no decoder: no `decoder_layers.*` among its names ({names} …).")
    return state


def _holds_decoder(value: Any) -> bool:
    """Return whether a value is, or contains, a state dict of a decoder."""
    return isinstance(value, Mapping) and any(
        "decoder_layers." in str(name) or _holds_decoder(inside) for name, inside in value.items()
    )
