"""A trained model out of a training checkpoint, without being told anything about it again."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from src.core.errors import UserError
from src.core.weights import freeze, load_strict, read, resolve
from src.formats.checkpoint_content import FORMAT_VERSION, RAESettings
from src.models.frozen_encoder import require_same_encoder
from src.models.rae import RAE

log = logging.getLogger(__name__)

Which = Literal["ema", "online"]
_PREFIX = {"ema": "ema_decoder.", "online": "rae.decoder."}


@dataclass(frozen=True)
class LoadedModel:
    """A frozen RAE and where it comes from."""

    rae: RAE
    description: dict[str, Any]
    """Plain values: source, weights, step, epoch, encoder identity; `config` is the whole configuration of its run."""

    @classmethod
    def of(cls, rae: RAE, source: object, encoder: Mapping[str, Any], facts: Mapping[str, Any]) -> Self:
        """Describe a model by what a checkpoint or the record of an export says; what `facts` lacks is unknown."""
        known = {name: facts.get(name) for name in ("step", "epoch", "config")}
        return cls(
            rae, {"source": str(source), "weights": facts.get("weights", "unknown"), "encoder": encoder, **known}
        )


def load_trained(path: str | Path, which: Which = "ema", changes: Mapping[str, Any] | None = None) -> LoadedModel:
    """The RAE of a checkpoint that training wrote.

    Args:
        which: the averaged weights or those of the optimiser.
        changes: `model:` keys to set otherwise (another place of the encoder, say).

    Raises:
        UserError: no such file, cut short, code in it, not a checkpoint of this trainer, another encoder than it was
            trained with.
    """
    file = existing(path)
    content = read(file)
    if not isinstance(content, Mapping) or content.get("format_version") != FORMAT_VERSION or "config" not in content:
        raise UserError(
            f"{file} is no checkpoint of this trainer. Expected a .ckpt from the checkpoints/ folder of a run; a "
            "decoder of others is given with --decoder (and --encoder, --stats)."
        )
    model = content["config"]["model"]
    settings = {name: model[name] for name in RAESettings.field_names()}
    settings |= {"pretrained_decoder_path": None, "normalization_stat_path": None, **(changes or {})}
    rae = RAE(**settings)
    stored = content["encoder"]
    require_same_encoder(rae.encoder, stored, file)
    state = content["state_dict"]
    prefix = _PREFIX[which]
    decoder = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    load_strict(rae.decoder, decoder, file)
    rae.set_statistics(state.get("rae.latent_mean"), state.get("rae.latent_var"))
    freeze(rae)
    facts = {"weights": which, "step": content["global_step"], "epoch": content["epoch"], "config": content["config"]}
    return LoadedModel.of(rae, file, dict(stored), facts)


def existing(path: str | Path) -> Path:
    """Return the file of a checkpoint. UserError where there is none."""
    file = resolve(path)
    if file.is_file():
        return file
    beside = sorted(other.name for other in file.parent.glob("*.ckpt")) if file.parent.is_dir() else []
    hint = f"That folder has {', '.join(beside)}." if beside else "Checkpoints lie in logs/runs/DATE/TIME/checkpoints."
    raise UserError(f"Checkpoint not found: {file} (from --checkpoint). {hint}")


def statistics_digest(rae: RAE) -> str | None:
    """Return 16 hex digits of the mean and variance that latents are normalised with; None without."""
    if not rae.has_statistics:
        return None
    mean = torch.zeros(rae.latent_shape) if rae.latent_mean is None else rae.latent_mean
    var = torch.ones(rae.latent_shape) if rae.latent_var is None else rae.latent_var
    data = torch.stack([mean, var]).float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]
