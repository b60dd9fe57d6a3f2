"""The random numbers of a training step, from the stream of `src/core/random_streams.py`.

Legend: B micro-batch on this rank. Per image they depend on (seed, epoch, position in the epoch), for a whole micro-batch
on (seed, epoch, number of the micro-batch), for a step on (seed, step): never on ranks, workers or what ran before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from src.core import random_streams as stream
from src.core.errors import UserError
from src.core.random_streams import Purpose
from src.losses.diffaug import UNIFORMS_PER_BATCH, UNIFORMS_PER_SAMPLE, DiffAug, Draws
from src.models.layers import random_subset
from src.models.rae import RAE
from src.training.settings import ModelSettings
from src.training.stage1_step import NoiseDraws, Phase


@dataclass(frozen=True)
class GeneratorDraws:
    noise: NoiseDraws | None
    augment: Draws | None
    layers: tuple[int, ...] | None
    """Blocks of the encoder to use in this step; None: all that were chosen."""


class StepDraws:
    def __init__(self, settings: ModelSettings, rae: RAE, augment: DiffAug | None) -> None:
        self.seed = settings.loop.seed
        self.tau = settings.rae.noise_tau
        self.subset = settings.layer_subset
        self.latent_shape = rae.latent_shape
        self.layers = rae.encoder.layers
        if self.subset.kind != "none" and len(self.layers) == 1:
            raise UserError(
                f"model.layer_subset.kind={self.subset.kind} needs several blocks to choose from, but the latent is block "
                f"{self.layers[0]} alone. Set model.encoder_params.layers (k7, k23 or a list), or model.layer_subset.kind=none."
            )
        self.augment = augment

    def generator(
        self, batch: Mapping[str, Any], batch_idx: int, step: int, device: torch.device, phase: Phase
    ) -> GeneratorDraws:
        """`batch_idx`: number of the micro-batch in its epoch; `step`: of the generator update."""
        epoch, positions = int(batch["epoch"]), batch["position"].tolist()
        noise = None
        if self.tau > 0:
            sigma = self.tau * stream.uniforms(self.seed, Purpose.NOISE_LEVEL, epoch, positions, 1)[:, 0]
            normal = stream.normals(self.seed, Purpose.LATENT_NOISE, epoch, positions, self.latent_shape, device)
            noise = NoiseDraws(sigma.to(device, non_blocking=True), normal)
        augment = None
        if phase.gan:
            augment = self._augment(Purpose.AUGMENT_GENERATOR, epoch, positions, batch_idx, 0, device)
        return GeneratorDraws(noise, augment, self.blocks(step))

    def discriminator(
        self,
        label: Literal["fake", "real"],
        batch: Mapping[str, Any],
        batch_idx: int,
        update: int,
        device: torch.device,
    ) -> Draws | None:
        purpose = Purpose.AUGMENT_FAKE if label == "fake" else Purpose.AUGMENT_REAL
        return self._augment(purpose, int(batch["epoch"]), batch["position"].tolist(), batch_idx, update, device)

    def blocks(self, step: int) -> tuple[int, ...] | None:
        """The random subset of the encoder's chosen blocks for `step`, the same on all ranks; None: all of them."""
        if self.subset.kind == "none":
            return None
        uniforms = stream.generator(self.seed, Purpose.LAYER_SUBSET, 0, step).random(len(self.layers))
        return random_subset(self.layers, self.subset.keep_probability, uniforms)

    def _augment(
        self, purpose: Purpose, epoch: int, positions: list[int], batch_idx: int, update: int, device: torch.device
    ) -> Draws | None:
        if self.augment is None:
            return None
        # Each update takes its own columns; the switches of a batch come from their own place beyond all images.
        count = UNIFORMS_PER_SAMPLE * (update + 1)
        samples = stream.uniforms(self.seed, purpose, epoch, positions, count)[:, -UNIFORMS_PER_SAMPLE:]
        switches = stream.uniforms(self.seed, purpose, epoch, [2**62 + batch_idx], UNIFORMS_PER_BATCH * (update + 1))
        return self.augment.draw(switches[0, -UNIFORMS_PER_BATCH:], samples).to(device)
