"""Generate latents with a stage-2 sampler, paired with real images, to fine-tune a decoder on.

Source: arXiv 2602.08620, which fine-tunes decoders on pairs from real images; the path and its random draws are ours:

    z_t0 = (1 - t0) z + t0 eps      z the normalised latents of the images
    z~   = z_t0 integrated from t0 to 0 by a trained diffusion transformer

The decoder gets z~, the losses compare with the image. t0 = 0 gives z itself, t0 = 1 a sample unrelated to the image.

Legend: B batch, C latent channels, h = w latent grid.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from src.core import random_streams as streams
from src.core.errors import UserError
from src.core.random_streams import Purpose
from src.evaluation.sampler import Sampler, SamplerSettings
from src.formats.checkpoint import LoadedModel
from src.formats.stage2 import open_generator
from src.losses.flow_matching import interpolate, sampling_grid
from src.models.rae import RAE
from src.training.settings import GeneratedLatentsSettings

NO_CLASS = -1
"""Label of an image without a class."""


class GeneratedLatents(nn.Module):
    """Maps raw latents to raw latents. Solver, classifier-free and internal guidance come from the checkpoint's sampler."""

    def __init__(self, settings: GeneratedLatentsSettings, rae: RAE, seed: int) -> None:
        """Raises UserError if there is no such checkpoint, or its encoder or statistics differ from the model's."""
        super().__init__()
        assert settings.checkpoint is not None
        own = LoadedModel.of(
            rae, "of this run (its statistics: model.normalization_stat_path)", rae.encoder.identity(), {}
        )
        try:
            generator = open_generator(settings.checkpoint, loaded=own, key="model.generated.checkpoint")
        except UserError as error:
            raise UserError(f"model.generated.checkpoint={settings.checkpoint}: {error}") from error
        self.t0, self.seed, self.network = settings.t0, seed, generator.network
        self.trained_steps = generator.step
        sampler = SamplerSettings.parse({**generator.sampler, "auto": 1.0}, "sampler")  # no second network
        self.sampler = Sampler(self.network, sampler, generator.flow, seed)
        self._grid = sampling_grid(settings.steps, self.sampler.shift, "raev2", settings.t0)

    def check_labels(self, classes: int | None) -> None:
        """Raise UserError if the network cannot use the labels of the data: `classes` of them, None: unlabelled."""
        if classes is None and self.network.null_label is None:
            raise UserError(
                "The data has no labels, and the model of model.generated.checkpoint needs a class for each image."
            )
        if classes is not None and classes > self.network.num_classes:
            raise UserError(
                f"The data has {classes} classes, the model of model.generated.checkpoint {self.network.num_classes}."
            )

    @torch.no_grad()
    def forward(self, rae: RAE, latents: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return z~ (raw, float32) for raw latents B C h w of a batch. Draws are functions of (seed, epoch, position)."""
        epoch, positions = int(batch["epoch"]), batch["position"].tolist()
        labels = torch.as_tensor(batch.get("label", [NO_CLASS] * len(positions)))
        labels = self.network.known(labels).to(latents.device, non_blocking=True)
        noise = streams.normals(self.seed, Purpose.GENERATED_NOISE, epoch, positions, rae.latent_shape, latents.device)
        with record_function("generate"):
            start = interpolate(
                rae.normalize(latents.float()), noise, latents.new_full((len(noise),), self.t0, dtype=torch.float32)
            )
            end = self.sampler.integrate(start, labels, self._grid)
        return rae.denormalize(end)
