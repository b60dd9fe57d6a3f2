"""The random numbers of a stage-1 step, from the streams of `src/core/random_streams.py`.

Legend: B micro-batch on this rank. Per image they depend on (seed, epoch, position in the epoch), for a whole micro-batch
on (seed, epoch, number of the micro-batch), for a step on (seed, step): never on ranks, workers or what ran before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from src.core import random_streams as streams
from src.core.errors import UserError
from src.core.random_streams import Purpose
from src.losses.diffaug import UNIFORMS_PER_BATCH, UNIFORMS_PER_SAMPLE, DiffAug, Draws
from src.models.layers import random_subset
from src.models.rae import RAE
from src.training.settings import LatentNoiseSettings, LayerSubset
from src.training.stage1_step import LatentNoise

Batch = Mapping[str, Any]
"""Of the loader: `epoch` and `position` (B,) say which images of which epoch these are."""


@dataclass(frozen=True)
class StepNoise:
    """All draws of stage 1. Results are on `device`."""

    rae: RAE
    augmentation: DiffAug
    levels: LatentNoiseSettings
    subset: LayerSubset
    seed: int

    def __post_init__(self) -> None:
        layers = self.rae.encoder.layers
        if self.subset.kind != "none" and len(layers) == 1:
            raise UserError(
                f"model.layer_subset.kind={self.subset.kind} needs several blocks to choose from, but the latent is block "
                f"{layers[0]} alone. Set model.encoder_params.layers (k7, k23 or a list), or model.layer_subset.kind=none."
            )

    def latents(self, batch: Batch, device: torch.device) -> LatentNoise | None:
        """Return sigma of each image or token (`model.noise`) and N(0, I); None where noise_tau is 0."""
        if self.rae.noise_tau == 0:
            return None
        epoch, positions = int(batch["epoch"]), batch["position"].tolist()
        shape = self.rae.latent_shape
        grid = shape[1:] if self.levels.per == "token" else (1, 1)
        uniforms = streams.uniforms(self.seed, Purpose.NOISE_LEVEL, epoch, positions, grid[0] * grid[1])
        sigma = self.levels.quantile(uniforms, self.rae.noise_tau)
        normal = streams.normals(self.seed, Purpose.LATENT_NOISE, epoch, positions, shape, device)
        return LatentNoise(sigma.to(device, non_blocking=True).view(-1, 1, *grid), normal)

    def augment(self, purpose: Purpose, batch: Batch, number: int, update: int, device: torch.device) -> Draws:
        """Return the draws of DiffAug. `number`: of the micro-batch in its epoch; `update`: of D's updates in the step."""
        epoch, positions = int(batch["epoch"]), batch["position"].tolist()
        # Each update takes its own columns; the switches of a batch come from their own place beyond all images.
        count = UNIFORMS_PER_SAMPLE * (update + 1)
        samples = streams.uniforms(self.seed, purpose, epoch, positions, count)[:, -UNIFORMS_PER_SAMPLE:]
        switches = streams.uniforms(self.seed, purpose, epoch, [2**62 + number], UNIFORMS_PER_BATCH * (update + 1))
        return self.augmentation.draw(switches[0, -UNIFORMS_PER_BATCH:], samples.to(device, non_blocking=True))

    def blocks(self, step: int) -> tuple[int, ...] | None:
        """Return the subset of the encoder's chosen blocks for `step`, the same on all ranks; None: all of them."""
        if self.subset.kind == "none":
            return None
        layers = self.rae.encoder.layers
        uniforms = streams.generator(self.seed, Purpose.LAYER_SUBSET, 0, step).random(len(layers))
        return random_subset(layers, self.subset.keep_probability, uniforms)
