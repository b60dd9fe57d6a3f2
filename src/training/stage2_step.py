"""Compute the loss of a stage-2 training step, in plain torch: flow matching on RAE latents. Sources: RAE (arXiv 2510.11690), RAEv2
(arXiv 2605.18324); docs/recipe.md, "Stage 2".

    z    = (encode(flip(x)) - mean) / sqrt(var + 1e-5)      frozen, float32
    t    = shift(draw of the distribution)                  1 is noise, 0 is data
    z_t  = (1 - t) z + t eps
    loss = mean |v(z_t, t, y) - (eps - z)|^2                y is the null label with probability label_dropout

Legend: B batch, C latent channels, h = w latent grid, K classes (K itself is the null label).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from src.core import random_streams as streams
from src.core.images import bytes_to_unit
from src.core.random_streams import Purpose
from src.losses import flow_matching as flow
from src.losses.flow_matching import FlowSettings
from src.models.rae import RAE


@dataclass(frozen=True)
class FlowDraws:
    """All random draws for a micro-batch, one row per image."""

    noise: Tensor
    """eps, B C h w."""
    time: Tensor
    """U[0, 1), (B,), on the CPU: the distributions of t use float64, which not every device has."""
    drop: Tensor
    """U[0, 1), (B,): below label_dropout the label is dropped."""
    flip: Tensor
    """U[0, 1), (B,): below the flip probability the image is mirrored."""

    @classmethod
    def at(
        cls, seed: int, batch: Mapping[str, Any], shape: tuple[int, int, int], device: torch.device, training: bool
    ) -> "FlowDraws":
        """Return the draws of a batch: functions of (seed, epoch, position) only, not of what ran before."""
        epoch, positions = int(batch["epoch"]), batch["position"].tolist()
        noise, scalars = (
            (Purpose.FLOW_NOISE, Purpose.FLOW_SCALARS) if training else (Purpose.EVAL_NOISE, Purpose.EVAL_SCALARS)
        )
        columns = streams.uniforms(seed, scalars, epoch, positions, 3)
        drop, flip = columns[:, 1:].to(device, non_blocking=True).unbind(1)
        return cls(streams.normals(seed, noise, epoch, positions, shape, device), columns[:, 0], drop, flip)


@dataclass
class FlowStep:
    """Computes the loss of a micro-batch, independent of optimiser and Lightning."""

    rae: RAE
    settings: FlowSettings
    num_classes: int
    label_dropout: float
    flip_probability: float
    normalize_stored: bool = False
    """Whether stored latents are raw and still have to be normalised."""

    def __post_init__(self) -> None:
        self.shift = self.settings.shift_for(self.rae.latent_shape)

    def latents(self, batch: Mapping[str, Any], draws: FlowDraws, training: bool) -> Tensor:
        """Return the normalised latents B C h w of a batch: the stored `latent`, or `image` (uint8 B 3 H W), randomly mirrored in
        training and encoded in float32 regardless of autocast."""
        if "latent" in batch:
            return self.rae.normalize(batch["latent"]) if self.normalize_stored else batch["latent"]
        images, flip = batch["image"], draws.flip < (self.flip_probability if training else 0)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        with torch.autocast(images.device.type, enabled=False), record_function("encode"):
            return self.rae.encode(bytes_to_unit(images), check=False)

    def dropped(self, labels: Tensor, draws: FlowDraws) -> Tensor:
        """Return training labels (B,) with dropped ones replaced by the null label."""
        return torch.where(draws.drop < self.label_dropout, self.num_classes, labels)

    def losses(self, network: nn.Module, latents: Tensor, labels: Tensor, draws: FlowDraws) -> dict[str, Tensor]:
        """Return per-image terms (B,): loss; full and base if there is a base head; zero, the loss of an all-zero output.

        Args:
            latents: normalised, B C h w float32.
            labels: (B,) int64 in 0..K, K: the null label.
        """
        settings = self.settings
        t = settings.draw_time(draws.time, self.shift).to(latents.device, non_blocking=True)
        with record_function("denoise"):
            output = network(flow.interpolate(latents, draws.noise, t), t, labels)

        def loss_of(output: Any) -> dict[str, Tensor]:
            return flow.flow_matching_loss(
                output, latents, draws.noise, t, settings.prediction, settings.t_eps, settings.base_weight
            )

        zero = torch.zeros_like(latents)
        return loss_of(output) | {"zero": loss_of((zero, zero) if isinstance(output, tuple) else zero)["loss"]}
