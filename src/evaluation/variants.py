"""Reconstruct each image of an evaluation in several ways: by different models, from different encoder blocks, with
different amounts of latent noise.

Legend: B batch, C latent channels, h = w latent grid, H, W image px.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from src.core.random_streams import Purpose, normals
from src.formats.checkpoint import LoadedModel
from src.models.frozen_encoder import identity_differences
from src.models.layers import parse_layers
from src.models.rae import RAE

log = logging.getLogger(__name__)

_NOISE_SEED = 0


@dataclass(frozen=True)
class Variant:
    """One way to reconstruct an image."""

    model: str
    """Path or name it was loaded from."""
    rae: RAE
    label: str
    """Encoder blocks as the user named them; empty: the model's own."""
    layers: tuple[int, ...] | None
    sigma: float
    """Standard deviation of the noise on raw latents, before latent normalisation."""


def variants_of(model: LoadedModel, layers: Sequence[str], sigmas: Sequence[float]) -> list[Variant]:
    """Return every combination of blocks and sigma. Raises UserError for blocks that the encoder does not have."""
    choices: list[tuple[str, tuple[int, ...] | None]] = [("", None)]
    encoder, source = model.rae.encoder, str(model.description["source"])
    if layers:
        choices = [(text, parse_layers(text, encoder.depth, "--layers")) for text in layers]
    for text, blocks in choices:
        if blocks is not None and not set(blocks) <= set(encoder.layers):
            log.warning("--layers %s: the decoder was only trained on the blocks %s.", text, list(encoder.layers))
    return [Variant(source, model.rae, text, blocks, sigma) for text, blocks in choices for sigma in sigmas]


def share_encoders(models: Sequence[LoadedModel]) -> None:
    """Make models with identical encoders share one, so that it is in memory once and encodes each image once."""
    for i, model in enumerate(models):
        for other in models[:i]:
            if not identity_differences(other.description["encoder"], model.description["encoder"]):
                model.rae.encoder = other.rae.encoder
                break


class Reconstructions:
    """`(images, rows)` -> one batch of reconstructions for each variant, in their order.

    An encoder runs once for each choice of blocks. The noise of an image depends only on its row in the data set, so all
    variants see the same noise.
    """

    def __init__(self, variants: Sequence[Variant], precision: Literal["32", "16", "bf16"]) -> None:
        self.variants, self.precision = variants, precision

        def pixels(rae: RAE) -> tuple[float, ...]:
            return tuple(torch.cat([rae.image_mean, rae.image_std]).flatten().tolist())

        sources = [(v.rae, v.layers) for v in variants]
        self._inputs = [(id(r.encoder), layers, r.geometry.encoder_input_size, pixels(r)) for r, layers in sources]
        """Everything that the latents of a variant depend on."""

    def __call__(self, images: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """Reconstruct images uint8 B 3 H W with rows (B,) as float B 3 H W in [0, 1] scale, not clamped."""
        latents: dict[Any, Tensor] = {}  # B C h w each
        noise: dict[tuple[int, int, int], Tensor] = {}
        for variant, key in zip(self.variants, self._inputs, strict=True):
            rae, shape = variant.rae, variant.rae.latent_shape
            if key not in latents:
                with self._autocast(images.device):
                    latents[key] = rae.encode_raw(images, variant.layers).float()
            noisy = latents[key]
            if variant.sigma:
                if shape not in noise:
                    noise[shape] = normals(_NOISE_SEED, Purpose.LATENT_NOISE, 0, rows.tolist(), shape, images.device)
                noisy = noisy + variant.sigma * noise[shape]
            with self._autocast(images.device):
                output = rae.decode_raw(noisy)
            yield output.float()

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the autocast context of `precision`; on a CPU fp16 becomes bf16, as in training."""
        if self.precision == "32":
            return nullcontext()
        half = self.precision == "16" and device.type == "cuda"
        return torch.autocast(device.type, torch.float16 if half else torch.bfloat16)
