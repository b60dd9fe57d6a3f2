"""Read checkpoints of this trainer: check their format, get the RAE arguments from their config, load the trained model."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from src.core.distributed import require_same_step
from src.core.errors import UserError
from src.core.geometry import Pixels
from src.core.json_files import Document, check_json
from src.core.key_mapping import below
from src.core.settings import Settings
from src.core.weights import freeze, load_strict, read, resolve
from src.models.encoder_presets import expand_encoder, source_key
from src.models.frozen_encoder import identity_differences, require_same_encoder
from src.models.rae import RAE

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_TINY_CHANNELS = (4, 8, 8, 16, 16)
# Latent statistics don't depend on the decoder, so the smallest one is used.
_SMALL_DECODER = "configs/decoder/tiny"

_OTHER_FILES_HINT = "give a third-party decoder with --decoder (and --encoder, --stats)"

Which = Literal["ema", "online"]
_PREFIX = {"ema": "ema_decoder.", "online": "rae.decoder."}


class RAESettings(Settings):
    """Arguments of `RAE`, with the same names."""

    typed_as: ClassVar[Mapping[str, str]] = {"image_size": "data.image_size"}

    encoder_cls: str
    encoder_config_path: str
    encoder_params: Mapping[str, Any]
    encoder_input_size: Pixels | None
    image_size: Pixels
    decoder_config_path: str
    decoder_patch_size: Pixels
    decoder_denormalize: bool
    pretrained_decoder_path: str | None
    normalization_stat_path: str | None
    noise_tau: float = Field(ge=0)
    train_positions: bool
    activation_checkpointing: bool


class OtherStage(UserError):
    """A stage-2 checkpoint was given where a stage-1 checkpoint is expected."""


@dataclass(frozen=True)
class LoadedModel:
    """A frozen RAE and its origin."""

    rae: RAE
    description: dict[str, Any]
    """Plain values: source, weights, step, epoch, encoder identity; `config` is the full configuration of its run."""

    @classmethod
    def of(cls, rae: RAE, source: object, encoder: Mapping[str, Any], facts: Mapping[str, Any]) -> Self:
        """Describe a model by the `facts` in a checkpoint or an export's record; missing ones are unknown."""
        known = {name: facts.get(name) for name in ("step", "epoch", "config")}
        return cls(
            rae, {"source": str(source), "weights": facts.get("weights", "unknown"), "encoder": encoder, **known}
        )


class _Config(Document):
    model: dict[str, Any]


def check_parts(content: Mapping[str, Any], file: object) -> None:
    """Raise UserError if a part that every checkpoint of this trainer has is missing or of the wrong type."""
    parts = {"encoder": dict[str, Any], "state_dict": dict[str, Any], "architecture": (dict[str, Any], None)}
    remedy = "It was modified after training wrote it; use another one."
    check_json(dict(content), file, remedy, config=_Config, global_step=int, epoch=int, **parts)


class _Loops(Document):
    fit_loop: dict[str, Any]


def check_resumable(content: Any, file: object) -> None:
    """Raise UserError if a file is not a checkpoint of this trainer, or lacks what a run needs to resume."""
    if not isinstance(content, dict) or not {"state_dict", "loops"} <= content.keys():
        raise UserError(
            f"{file} is not a checkpoint of a training run. Other weights go into model.pretrained_decoder_path, not ckpt_path."
        )
    if (version := content.get("format_version")) != FORMAT_VERSION:
        raise UserError(
            f"{file}: format_version is {version}, this release reads {FORMAT_VERSION}. It is either not a checkpoint of this "
            "trainer (other weights go into model.pretrained_decoder_path) or from another release."
        )
    parts = {"state_dict": dict[str, Any], "optimizer_states": Annotated[list[Any], Field(min_length=1)]}
    parts |= {"lr_schedulers": list[Any], "callbacks": dict[str, Any], "pytorch-lightning_version": str}
    numbers = dict.fromkeys(("epoch", "global_step", "skipped_steps"), int)
    remedy = "It was modified after training wrote it. Resume from another one: best.ckpt, epoch_XXX.ckpt."
    check_json(content, file, remedy, loops=_Loops, config=_Config, **parts, **numbers)


def open_checkpoint(path: str | Path, others: str = _OTHER_FILES_HINT) -> tuple[Path, Mapping[str, Any]]:
    """Return the path and content of a training checkpoint of any stage.

    Args:
        others: the part of the error message that tells what to do with other files.

    Raises:
        UserError: no such file, truncated, contains code, not a checkpoint of this trainer.
    """
    file = existing(path)
    content = read(file)
    if not isinstance(content, Mapping) or content.get("format_version") != FORMAT_VERSION or "config" not in content:
        raise UserError(
            f"{file} is not a checkpoint of this trainer. Expected a .ckpt from the checkpoints/ folder of a run; {others}."
        )
    check_parts(content, file)
    return file, content


def load_trained(
    path: str | Path, which: Which = "ema", changes: Mapping[str, Any] | None = None, encoder: str | None = None
) -> LoadedModel:
    """Load the RAE of a training checkpoint.

    Args:
        which: the averaged weights or those of the optimiser.
        changes: `model:` keys to override.
        encoder: path or hub id of the encoder, if not the one used in training.

    Raises:
        UserError: as `open_checkpoint`; a stage-2 checkpoint; another encoder than it was trained with.
    """
    file, content = open_checkpoint(path)
    require_same_step(content["global_step"], file)
    model = content["config"]["model"]
    if "autoencoder" in model:
        raise OtherStage(
            f"{file} is a checkpoint of stage 2, a diffusion transformer, but an autoencoder is needed here. Give the one it was "
            f"trained on: {model['autoencoder']}."
        )
    if encoder is not None:
        params = (model.get("encoder_params") or {}) | {source_key(str(model.get("encoder_cls"))): encoder}
        model = model | {"encoder_config_path": encoder, "encoder_params": params}
    model = model | {"pretrained_decoder_path": None, "normalization_stat_path": None, **(changes or {})}
    rae = RAE(**vars(RAESettings.parse({n: model[n] for n in RAESettings.model_fields if n in model}, "model")))
    stored = content["encoder"]
    require_same_encoder(rae.encoder, stored, file)
    state = content["state_dict"]
    load_strict(rae.decoder, below(state, _PREFIX[which]), file)
    rae.set_statistics(state.get("rae.latent_mean"), state.get("rae.latent_var"))
    freeze(rae)
    facts = {"weights": which, "step": content["global_step"], "epoch": content["epoch"], "config": content["config"]}
    return LoadedModel.of(rae, file, dict(stored), facts)


def encoder_of(config: dict[str, Any]) -> RAE:
    """Build a frozen RAE with the encoder and sizes of a configuration, and a tiny untrained decoder."""
    model = expand_encoder(config["model"])
    settings = {name: model[name] for name in RAESettings.model_fields}
    settings |= {
        "decoder_config_path": _SMALL_DECODER,
        "pretrained_decoder_path": None,
        "normalization_stat_path": None,
    }
    rae = RAE(**settings)
    freeze(rae)
    return rae


def existing(path: str | Path, key: str = "--checkpoint") -> Path:
    """Return the path of an existing checkpoint. `key`: the config key or option it is from. Raises UserError if it is missing."""
    file = resolve(path)
    if file.is_file():
        return file
    near = file if file.is_dir() else file.parent
    found = (
        other
        for place in ("*.ckpt", "checkpoints/*.ckpt", "stage2_model.pt", "checkpoint.pt")
        for other in near.glob(place)
    )
    beside = sorted(str(other.relative_to(near)) for other in found)
    hint = f"That folder has {', '.join(beside)}." if beside else "Checkpoints are in logs/runs/DATE/TIME/checkpoints."
    if Path(path).is_file():  # in the working directory
        hint = f"Relative paths start at the project root: give {Path(path).absolute()}."
    raise UserError(f"Checkpoint not found: {file} (from {key}). {hint}")


def stored(config: Any, key: str) -> Any:
    """Return the value at a dotted key of nested mappings; None if it is missing."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def check_latents(
    what: object,
    loaded: LoadedModel,
    shape: Sequence[int],
    encoder: Mapping[str, Any] | None = None,
    statistics: str | None = None,
) -> None:
    """Raise UserError if the latents of `what` are not those of the model, judging by their shape (C, h, w) and, where known,
    the identity of their encoder and the digest of the statistics that normalise them."""
    rae, own = loaded.rae, loaded.description["encoder"]
    pairs = {"shape (C x h x w)": (tuple(shape), rae.latent_shape)}
    if statistics is not None:
        pairs["statistics"] = (statistics, statistics_digest(rae))
    differing = [f"{name}: {theirs} there, {ours} here" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if encoder is not None and (names := identity_differences(encoder, own)):
        differing.append(f"another encoder, by {', '.join(names)}: {dict(encoder)} there, {own} here")
    if differing:
        raise UserError(
            f"{what} does not fit the latents of the model {loaded.description['source']} ({'; '.join(differing)}). Give the model "
            "that made them, or one with the same encoder and statistics (for a .ckpt: --stats, model.statistics)."
        )


def statistics_digest(rae: RAE) -> str | None:
    """Return the digest (16 hex digits) of the mean and variance that normalise the latents; None if there are none."""
    if not rae.has_statistics:
        return None
    mean = torch.zeros(rae.latent_shape) if rae.latent_mean is None else rae.latent_mean
    var = torch.ones(rae.latent_shape) if rae.latent_var is None else rae.latent_var
    data = torch.stack([mean, var]).float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def with_current_keys(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node `model:` of a configuration with keys of earlier versions translated to the current ones."""
    current = dict(model)
    lpips, disc = _node(model, "lpips_arch"), _node(model, "disc_arch")
    arch = _node(disc, "arch")
    if "channels" in lpips:  # once configurable for untrained networks
        tiny = lpips.get("weights") == "untrained" and tuple(lpips["channels"]) == _TINY_CHANNELS
        del lpips["channels"]
        current["lpips_arch"] = lpips | {"weights": "tiny"} if tiny else lpips
    if arch.get("recipe") == "tiny":
        current["disc_arch"] = disc | {"arch": arch | {"recipe": "S_8", "weights": "tiny"}}
    if "noise_tau" in model:
        current.setdefault("noise", {"level": "uniform", "mu": 0.0, "s": 1.0, "per": "image"})
        current.setdefault("generated", {"checkpoint": None, "t0": 0.5, "steps": 10})
    return current


def _node(owner: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = owner.get(name)
    return dict(value) if isinstance(value, Mapping) else {}
