"""Read decoder weights and latent statistics in any form.

    official      a state dict with the published names (`model.pt`); an official training checkpoint (its `ema`)
    checkpoint    .ckpt of this trainer (its averaged decoder)
    folder        ours, from `src/export.py --format folder`
    diffusers     an `AutoencoderRAE` folder

The official names are those of our decoder, so its table is the identity; diffusers' table is in `diffusers_layout`.

Legend: C latent channels, h = w latent grid.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from src.core.errors import UserError
from src.core.geometry import Pixels
from src.core.json_files import read_json
from src.core.settings import Settings
from src.core.weights import load_strict, read, require, resolve
from src.formats import diffusers_layout
from src.formats.checkpoint import check_parts
from src.models.decoder import ViTDecoder, sincos_positions
from src.models.frozen_encoder import identity_differences
from src.models.positions import fit_positions

log = logging.getLogger(__name__)

Kind = Literal["official", "checkpoint", "folder", "diffusers"]
FOLDER_FORMAT = "rae-trainer"
FOLDER_VERSION = 1
FOLDER_WEIGHTS = "model.safetensors"
RECORD = "rae_export.json"
"""Beside every export: where it comes from. Readers do without it."""
STATISTICS = "stats.pt"
"""Latent statistics in the official format, beside every export of a model that has them."""
_POSITIONS = "decoder_pos_embed"
_WRAPPERS = ("module.", "_orig_mod.")
_STATES = ("ema", "state_dict", "model_state_dict", "model", "decoder")
"""Keys under which files of others keep a state dict; `ema` is that of official training checkpoints."""


@dataclass(frozen=True)
class DecoderFile:
    """A decoder with our names, as stored (any float type)."""

    path: Path
    kind: Kind
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None
    """Keys of `DecoderConfig` where the file says them: shapes don't show the number of heads."""
    denormalize: bool | None = None
    encoder: dict[str, Any] = field(default_factory=dict)
    """Identity of the encoder that it was trained with; empty where the file does not say."""


def kind_of(path: str | Path, key: str) -> tuple[Kind | None, Path]:
    """Return what a folder is, and the folder; a file inside an export stands for it. (None, file) for any other file.

    Raises:
        UserError: nothing there, or a folder of another kind. `key` is the config key or option that named it.
    """
    place = resolve(path)
    if (
        place.name in (FOLDER_WEIGHTS, diffusers_layout.WEIGHTS, "config.json")
        and (place.parent / "config.json").is_file()
    ):
        place = place.parent
    if not place.is_dir():
        return None, require(path, "Decoder, export or checkpoint", key)
    config = read_json(place / "config.json") if (place / "config.json").is_file() else {}
    if config.get("_class_name") == diffusers_layout.CLASS:
        return "diffusers", place
    if config.get("format") == FOLDER_FORMAT:
        if config.get("format_version") != FOLDER_VERSION:
            raise UserError(
                f"{place}: format_version is {config.get('format_version')}, this program reads {FOLDER_VERSION}."
            )
        return "folder", place
    found = config.get("_class_name") or config.get("model_type") or "no config.json of either kind"
    raise UserError(
        f"{key}={path} is a folder with {found}. Expected a decoder file (.pt, .ckpt, .safetensors), a folder "
        "written by "
        f"`src/export.py --format folder`, or a diffusers {diffusers_layout.CLASS} folder."
    )


def read_decoder(path: str | Path, key: str = "model.pretrained_decoder_path") -> DecoderFile:
    """Read a decoder in any of the four forms.

    Raises:
        UserError: missing, unreadable or cut short, or no decoder at all.
    """
    kind, place = kind_of(path, key)
    if kind == "diffusers":
        return _from_diffusers(place)
    if kind == "folder":
        config = read_folder_config(place)
        state = _below(read(place / FOLDER_WEIGHTS), "decoder.")
        denormalize = config["model"]["decoder_denormalize"]
        return DecoderFile(place, "folder", state, config["decoder"], denormalize, config["encoder"])
    content = read(place)
    if isinstance(content, Mapping) and "format_version" in content and "state_dict" in content:
        check_parts(content, place)
        sizes = {
            k.removeprefix("decoder config: "): v
            for k, v in content.get("architecture", {}).items()
            if k.startswith("decoder config: ")
        }
        state = _below(content["state_dict"], "ema_decoder.")
        denormalize = content.get("architecture", {}).get("model.decoder_denormalize")
        return DecoderFile(place, "checkpoint", state, sizes, denormalize, content["encoder"])
    return DecoderFile(place, "official", _official(content, place))


def load_decoder(decoder: ViTDecoder, path: str | Path, denormalize: bool, encoder: Mapping[str, Any]) -> None:
    """Load a decoder in any form into `decoder`, strictly. For another grid the positions follow `models/positions.py`.

    Args:
        denormalize: `decoder_denormalize` of the model; must be what the file says, where it says so.
        encoder: identity of the model's encoder; another one is a warning, since fine-tuning may want just that.
    """
    file = read_decoder(path)
    own = vars(decoder.config)
    differing = [
        f"{k}: file {file.config.get(k)!r}, model {own[k]!r}"
        for k in own
        if file.config and file.config.get(k) != own[k]
    ]
    if file.denormalize not in (None, denormalize):
        differing.append(f"decoder_denormalize: file {file.denormalize}, model {denormalize}")
    if differing:
        raise UserError(
            f"{file.path} holds another decoder ({'; '.join(differing)}). Set model.decoder_config_path and the "
            "keys named here to match."
        )
    differing = identity_differences(file.encoder, encoder) if file.encoder else []
    if differing:
        log.warning(
            "%s was trained with another encoder (%s): %s there, %s here.",
            file.path,
            ", ".join(differing),
            file.encoder,
            dict(encoder),
        )
    state = file.state
    if _POSITIONS in state:
        state = state | {_POSITIONS: fit_positions(state[_POSITIONS], decoder.grid, str(file.path))}
    load_strict(decoder, state, file.path)
    log.info("Decoder from %s (%s).", file.path, file.kind)


def read_statistics_content(path: str | Path) -> tuple[Any, Path]:
    """Return what a statistics file says (`mean`, `var`, perhaps `encoder`), or what an export or a checkpoint holds of it."""
    place = resolve(path)
    if not place.is_dir():
        file = require(path, "Latent statistics", "model.normalization_stat_path")
        content = read(file)
        if isinstance(content, Mapping) and "format_version" in content and "state_dict" in content:
            check_parts(content, file)
            state = content["state_dict"]
            content = {
                "mean": state.get("rae.latent_mean"),
                "var": state.get("rae.latent_var"),
                "encoder": content["encoder"],
            }
            _require_statistics(content["var"] if content["mean"] is None else content["mean"], file)
        return content, file
    kind, place = kind_of(path, "model.normalization_stat_path")
    if (place / STATISTICS).is_file():
        return read(place / STATISTICS), place / STATISTICS
    state = diffusers_layout.read_weights(place) if kind == "diffusers" else {}
    found = diffusers_layout.statistics(state, place)
    _require_statistics(found, place)
    assert found is not None
    return {"mean": found[0], "var": found[1]}, place


class FolderModel(Settings):
    """Arguments of `RAE` in `config.json` of our own folder."""

    encoder_cls: str
    encoder_params: dict[str, Any]
    image_size: Pixels
    decoder_patch_size: Pixels
    decoder_denormalize: bool
    train_positions: bool
    noise_tau: float = Field(ge=0)


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` of our own folder."""
    remedy = "It is damaged or not from `src/export.py --format folder`."
    rgb = Annotated[list[float], Field(min_length=3, max_length=3)]
    schema = {"model": FolderModel, "decoder": dict, "encoder": dict, "image_mean": rgb, "image_std": rgb}
    return read_json(folder / "config.json", remedy, **schema)


def read_record(folder: Path) -> dict[str, Any]:
    """Return what `src/export.py` noted beside an export; empty for folders of others."""
    if not (folder / RECORD).is_file():
        return {}
    optional = (dict[str, Any] | None, None)
    listed = (list[dict[str, Any]] | None, None)
    return read_json(folder / RECORD, encoder=optional, config=optional, run=optional, scores=listed)


def _from_diffusers(folder: Path) -> DecoderFile:
    config = diffusers_layout.read_config(folder)
    state = diffusers_layout.DECODER.to_ours(_below(diffusers_layout.read_weights(folder), "decoder."))
    state[_POSITIONS] = sincos_positions(config["decoder_hidden_size"], diffusers_layout.grid(config))[None]
    encoder = read_record(folder).get("encoder") or {}
    return DecoderFile(folder, "diffusers", state, diffusers_layout.decoder_config(config), True, encoder)


def _official(content: Any, file: Path) -> dict[str, Tensor]:
    """Return the state dict of a decoder with the official names, however it is wrapped; the averaged one where there are two."""
    if isinstance(content, Mapping) and {"mean", "var"} <= content.keys():
        raise UserError(
            f"{file} holds latent statistics, not a decoder: it belongs to model.normalization_stat_path (--stats)."
        )
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}; expected a state dict of a decoder.")
    while key := next((key for key in _STATES if isinstance(content.get(key), Mapping)), None):
        log.info("%s: the weights under %r are taken.", file, key)
        content = content[key]
    state = {_unwrapped(str(name)): value for name, value in content.items()}
    if any(name.startswith("decoder.decoder_layers.") for name in state):
        state = _below(state, "decoder.")
    if not any(name.startswith("decoder_layers.") for name in state):
        names = ", ".join(sorted(state)[:6])
        raise UserError(f"{file} holds no decoder: no `decoder_layers.*` among its names ({names} …).")
    return state


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _require_statistics(found: Any, place: Path) -> None:
    if found is None:
        raise UserError(
            f"{place} has no latent statistics. Set model.normalization_stat_path to a file that `python "
            "src/latent_stats.py` wrote, or to null."
        )
