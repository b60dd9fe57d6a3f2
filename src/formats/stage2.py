"""Open a trained diffusion transformer (a checkpoint or export of this trainer, or a file of the official code given with its
model name), and export one in the official format.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from src.core.compose import compose
from src.core.distributed import require_same_step
from src.core.errors import UserError
from src.core.files import write_torch
from src.core.json_files import Document, check_json
from src.core.key_mapping import below, unwrapped
from src.core.weights import freeze, load_strict, read, resolve
from src.formats.checkpoint import FORMAT_VERSION, LoadedModel, check_latents, existing, open_checkpoint, stored
from src.formats.decoder_files import RECORD, read_record
from src.formats.export import new_folder
from src.formats.opening import open_autoencoder
from src.formats.provenance import file_hashes, without_private_paths, write_record
from src.losses.flow_matching import FlowSettings
from src.models.dit import LatentTransformer, build_network
from src.models.frozen_encoder import is_untrained
from src.models.rae import RAE

log = logging.getLogger(__name__)

FORMAT = "stage2"
_EMA_PREFIX = "ema_network."


class _Model(Document):
    autoencoder: str | dict[str, Any]
    statistics: str | None
    image_size: int
    network: dict[str, Any]
    num_classes: int
    label_dropout: float
    flow: dict[str, Any]
    sampler: dict[str, Any]


class _Config(Document):
    model: _Model


@dataclass(frozen=True)
class Generator:
    """A frozen transformer on the CPU and everything needed to sample from it."""

    network: LatentTransformer
    autoencoder: LoadedModel
    """The autoencoder of its latents."""
    flow: FlowSettings
    sampler: dict[str, Any]
    """The node `sampler` of its configuration."""
    source: str
    step: int | None
    """Number of updates; None if unknown."""

    @property
    def rae(self) -> RAE:
        return self.autoencoder.rae


def open_generator(
    checkpoint: str | Path,
    model: str | None = None,
    autoencoder: str | None = None,
    loaded: LoadedModel | None = None,
    key: str = "--checkpoint",
) -> Generator:
    """Open the averaged weights of a trained transformer.

    Args:
        checkpoint: `.ckpt` of a stage-2 run, which needs no other argument; or a file of the official code.
        model: for an official file, the name of an experiment (ditdh_xl, raev2_dit_k7, ...).
        autoencoder: its path on this machine, or a YAML mapping; required for an official file.
        loaded: the autoencoder, if it is open already, e.g. that of the model which this one guides.
        key: the config key or option that `checkpoint` is from.

    Raises:
        UserError: missing or damaged files, a file without averaged weights, names or shapes that don't fit.
    """
    file = existing(checkpoint, key)
    content = read(file)
    ours = isinstance(content, Mapping) and content.get("format_version") == FORMAT_VERSION
    record = content if ours else _record(file)
    if ours and "autoencoder" not in (stored(content, "config.model") or {}):
        raise UserError(f"{file} is a checkpoint of stage 1, an autoencoder. A checkpoint of stage 2 is needed.")
    if record:
        sizes, remedy = dict[str, Any], "It was modified after it was written; use another one."
        check_json(
            dict(record), file, remedy, config=_Config, global_step=int, encoder=sizes, statistics=sizes, architecture=sizes,
            **({"state_dict": sizes} if ours else {}),
        )  # fmt: skip
        require_same_step(record["global_step"], file)
    if record and model is not None:
        raise UserError(f"--model {model}: {file} contains the configuration of its model. Drop the option.")
    if not record and model is None:
        raise UserError(
            f"{file} is not a checkpoint of this trainer: give its model with --model (ditdh_xl, dit_xl, raev2_dit_k7, "
            f"...){' and its autoencoder with --autoencoder' * (loaded is None)}."
        )
    config = record["config"]["model"] if record else compose([f"experiment={model}"])["model"]
    if "autoencoder" not in config:
        raise UserError(
            f"--model {model} is a model of stage 1. Give a diffusion transformer: ditdh_xl, dit_xl, raev2_dit_k7, ..."
        )
    if loaded is None:
        where, given = config["autoencoder"], _mapping_or_path(autoencoder)
        where = {**where, **given} if isinstance(where, Mapping) and isinstance(given, Mapping) else given or where
        statistics = config["statistics"]
        if statistics is not None and not resolve(statistics).exists():  # a path on another machine
            statistics = None
        loaded = open_autoencoder(where, statistics, config["image_size"])
    if record:
        check_latents(file, loaded, _latent_shape(record), record["encoder"], record["statistics"]["digest"])
    flow = FlowSettings.parse(config["flow"], "model.flow")
    network = build_network(
        config["network"], loaded.rae.latent_shape, config["num_classes"], config["label_dropout"], seed=0
    )
    load_strict(network, averaged_weights(content, file), file)
    freeze(network)
    step = record["global_step"] if record else None
    return Generator(network, loaded, flow, dict(config["sampler"]), str(file), step)


def _mapping_or_path(text: str | None) -> Any:
    """Return the value of --autoencoder, {} if not given. A path may look like any YAML, so only `{...}` is parsed."""
    if text is None or not text.lstrip().startswith("{"):
        return {} if text is None else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"--autoencoder {text}: {' '.join(str(error).split())}. Expected a path, or a mapping such as "
            "'{decoder: model.pt, statistics: stat.pt}'."
        ) from error


def load_pretrained(network: LatentTransformer, path: str) -> None:
    """Load the averaged weights of one of our checkpoints or an official file before training (`model.pretrained_path`).

    With another number of labels, the network keeps its own label table. Raises UserError if the file is missing or doesn't fit.
    """
    file = existing(path, "model.pretrained_path")
    state, own = averaged_weights(read(file), file), network.label_table
    (name,) = (name for name, parameter in network.named_parameters() if parameter is own)
    if isinstance(table := state.get(name), Tensor) and table.shape[:1] != own.shape[:1]:
        log.warning("%s: its model.num_classes is not %d; its label table is not loaded.", file, network.num_classes)
        state[name] = own.detach()
    load_strict(network, state, file)


def averaged_weights(content: Any, file: object) -> dict[str, Tensor]:
    """Return the averaged weights of one of our checkpoints or an official file: `ema` of a training checkpoint, or a bare
    state dict. Raises UserError if there are none."""
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}; expected a state dict or a training checkpoint.")
    if "format_version" in content and isinstance(content.get("state_dict"), Mapping):
        return below(unwrapped(content["state_dict"]), _EMA_PREFIX)
    if isinstance(content.get("ema"), Mapping):
        content = content["ema"]
    elif isinstance(content.get("model"), Mapping):
        raise UserError(
            f"{file} has `model` and no `ema`: these are the optimiser's weights, and only averaged ones are comparable with "
            "published scores. Give a checkpoint with `ema`, or save its `model` alone as a state dict to use it anyway."
        )
    return unwrapped(content)


def export_official(checkpoint: str | Path, output: Path, dtype: torch.dtype, overwrite: bool) -> None:
    """Write the averaged weights of one of our checkpoints as the published code expects them, with a record and a card.

    RAE expects a bare state dict (`stage2_model.pt`), RAEv2 a dictionary with `ema` (`checkpoint.pt`). The file names are ours.

    Raises:
        UserError: not a stage-2 checkpoint, or `output` exists and must not be replaced.
    """
    file, content = open_checkpoint(checkpoint)
    config = content["config"]
    state = {name: value.to(dtype) for name, value in below(content["state_dict"], _EMA_PREFIX).items()}
    v2 = config["model"]["network"]["name"] == "RAEv2DiT"
    name = "checkpoint.pt" if v2 else "stage2_model.pt"
    untrained = ["encoder"] * is_untrained(content["encoder"])
    with new_folder(output, overwrite) as folder:
        write_torch(folder / name, {"ema": state} if v2 else state)
        kept = ("global_step", "epoch", "architecture", "encoder", "statistics", "config")
        facts = {"format": FORMAT, "created": datetime.now(UTC).isoformat(timespec="seconds"), "source": file.name}
        facts |= {key: content[key] for key in kept} | {"untrained": untrained, "files": file_hashes(folder)}
        write_record(without_private_paths(facts), folder)
        random = "**UNTRAINED encoder: random weights, not a result.**\n\n" if untrained else ""
        size, shape = f"{sum(v.numel() for v in state.values()) / 1e6:.1f} M numbers", _latent_shape(content)
        (folder / "README.md").write_text(
            f"# Diffusion transformer on RAE latents\n\n{random}`{name}`: averaged weights after {content['global_step']:,} "
            f"updates, {config['model']['network']['name']} with {size}, on latents of {' x '.join(map(str, shape))} of "
            f"`{content['encoder'].get('source')}`. `{RECORD}` has the full configuration. Sampling:\n\n"
            f"```bash\npython src/sample.py --checkpoint {name} --autoencoder AUTOENCODER --output samples.npz\n```\n"
        )


def _record(file: Path) -> dict[str, Any]:
    """Return the record that `export_official` wrote next to a file; empty for third-party files."""
    record = read_record(file.parent)
    return record if record.get("format") == FORMAT and file.name in (record.get("files") or ()) else {}


def _latent_shape(content: Mapping[str, Any]) -> tuple[int, int, int]:
    sizes = content["architecture"]
    return sizes["latent channels"], sizes["latent grid"], sizes["latent grid"]
