"""Open a trained diffusion transformer: a checkpoint of ours, or a file of the official code with the name of its model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from src.core.compose import compose
from src.core.errors import UserError
from src.core.weights import freeze, load_strict, read
from src.formats.autoencoder import open_autoencoder
from src.formats.checkpoint import existing
from src.losses.flow_matching import FlowSettings
from src.models.dit import LatentTransformer, build_network
from src.models.rae import RAE

_OURS = "ema_network."
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Generator:
    """A frozen transformer on the CPU and all that is needed to sample from it."""

    network: LatentTransformer
    rae: RAE | None
    """None where only the transformer was asked for."""
    flow: FlowSettings
    sampler: dict[str, Any]
    """The node `sampler` of its configuration."""
    shift: float
    source: str
    step: int | None
    """Updates; None where the file does not say."""


def open_generator(
    checkpoint: str | Path,
    model: str | None = None,
    autoencoder: str | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Generator:
    """Open the averaged weights of a trained transformer.

    Args:
        checkpoint: `.ckpt` of a stage-2 run, which says everything by itself; or a file of the official code.
        model: of a foreign file, the name of an experiment (ditdh_xl, raev2_dit_k7, ...).
        autoencoder: where it lies here, or a mapping in YAML; of a foreign file it must be given.
        shape: C, h, w of the latents; then the autoencoder is not opened (a guide needs none).

    Raises:
        UserError: missing or damaged files, a file without averaged weights, names or shapes that don't fit.
    """
    file = existing(checkpoint)
    content = read(file)
    ours = isinstance(content, Mapping) and "format_version" in content
    if ours and "autoencoder" not in content["config"]["model"]:
        raise UserError(f"{file} is a checkpoint of stage 1, an autoencoder. Sampling needs one of stage 2.")
    if ours and model is not None:
        raise UserError(f"--model {model}: {file} says itself which model it is. Drop the option.")
    if not ours and model is None:
        raise UserError(
            f"{file} is no checkpoint of this trainer: say which model it is with --model (ditdh_xl, dit_xl, raev2_dit_k7, "
            "...) and give its --autoencoder."
        )
    config = content["config"]["model"] if ours else compose([f"experiment={model}"])["model"]
    rae = None
    if shape is None:
        where = yaml.safe_load(autoencoder) if autoencoder is not None else config["autoencoder"]
        rae = open_autoencoder(where, config["statistics"], config["image_size"]).rae
        shape = rae.latent_shape
    flow = FlowSettings.parse(config["flow"], "model.flow")
    network = build_network(config["network"], shape, config["num_classes"], config["label_dropout"], seed=0)
    load_strict(network, _own(content) if ours else foreign_weights(content, file), file)
    freeze(network)
    step = content["global_step"] if ours else None
    return Generator(network, rae, flow, dict(config["sampler"]), flow.shift_for(shape), str(file), step)


def foreign_weights(content: Any, file: object) -> dict[str, Tensor]:
    """Return the averaged weights of an official file: `ema` of a training checkpoint, or a bare state dict."""
    if isinstance(content, Mapping) and isinstance(content.get("ema"), Mapping):
        content = content["ema"]
    elif isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        raise UserError(
            f"{file} has `model` and no `ema`: these are the optimiser's weights, and only averaged ones are comparable with "
            "published scores. Give a checkpoint with `ema`, or save its `model` alone as a state dict to use it all the same."
        )
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}; expected a state dict or a training checkpoint.")
    return {_unwrapped(str(name)): value for name, value in content.items()}


def _own(content: Mapping[str, Any]) -> dict[str, Tensor]:
    state = content["state_dict"]
    return {name.removeprefix(_OURS): value for name, value in state.items() if name.startswith(_OURS)}


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name
