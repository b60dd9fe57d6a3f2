"""Draw the random numbers of a stage-1 step, from the streams of `src/core/random_streams.py`.

Draws per image depend on (seed, epoch, position in the epoch), per micro-batch on (seed, epoch, micro-batch number), per step on
(seed, step): never on ranks, workers or what ran before. Legend: B micro-batch on this rank.
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
"""Batch of the loader: `epoch` and `position` (B,) identify its images."""


@dataclass(frozen=True)
class StepNoise:
    """Makes all random draws of stage 1. Results are on `device`."""

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
        """Return sigma per image or token (`model.noise`) and draws from N(0, I); None if noise_tau is 0."""
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
        """Return the draws for DiffAug. `number`: micro-batch in its epoch; `update`: update of D in its step, from 0."""
        epoch, positions = int(batch["epoch"]), batch["position"].tolist()
        # Each update uses its own columns; per-batch switches use positions beyond those of all images.
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
