"""A trained model out of a training checkpoint, without being told anything about it again."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from src.core.errors import UserError
from src.core.weights import freeze, load_strict, read, resolve
from src.formats.checkpoint_content import FORMAT_VERSION, RAESettings
from src.formats.identity import require_same_encoder
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
    settings = {name: model[name] for name in RAESettings.__dataclass_fields__}
    settings |= {"pretrained_decoder_path": None, "normalization_stat_path": None, **(changes or {})}
    rae = RAE(**settings)
    stored = content["encoder"]
    require_same_encoder(rae.encoder, stored, file)
    state = content["state_dict"]
    prefix = _PREFIX[which]
    decoder = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    load_strict(rae.decoder, decoder, file)
    if "rae.latent_mean" in state:
        rae.set_statistics(state["rae.latent_mean"], state["rae.latent_var"])
    freeze(rae)
    description = {
        "source": str(file),
        "weights": which,
        "step": content["global_step"],
        "epoch": content["epoch"],
        "encoder": dict(stored),
        "config": content["config"],
    }
    return LoadedModel(rae, description)


def existing(path: str | Path) -> Path:
    """Return the file of a checkpoint. UserError where there is none."""
    file = resolve(path)
    if file.is_file():
        return file
    beside = sorted(other.name for other in file.parent.glob("*.ckpt")) if file.parent.is_dir() else []
    hint = f"That folder has {', '.join(beside)}." if beside else "Checkpoints lie in logs/runs/DATE/TIME/checkpoints."
    raise UserError(f"Checkpoint not found: {file} (from --checkpoint). {hint}")
