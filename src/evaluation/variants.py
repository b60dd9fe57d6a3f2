"""The ways in which one evaluation reconstructs each image: from which blocks of the encoder, with how much noise.

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
from src.models.layers import parse_layers
from src.models.rae import RAE

log = logging.getLogger(__name__)

_NOISE_SEED = 0


@dataclass(frozen=True)
class Variant:
    """One way to reconstruct an image."""

    label: str
    """Of its blocks, as the user named them; empty: the model's own."""
    layers: tuple[int, ...] | None
    sigma: float
    """Standard deviation of the noise on raw latents, before latent normalisation."""


def variants_of(layers: Sequence[str], sigmas: Sequence[float], encoder: Any) -> list[Variant]:
    """Return every choice of blocks with every sigma. UserError for blocks that the encoder does not have."""
    choices: list[tuple[str, tuple[int, ...] | None]] = [("", None)]
    if layers:
        choices = [(text, parse_layers(text, encoder.depth, "--layers")) for text in layers]
    for text, blocks in choices:
        if blocks is not None and not set(blocks) <= set(encoder.layers):
            log.warning("--layers %s: the decoder was trained on the blocks %s alone.", text, list(encoder.layers))
    return [Variant(text, blocks, sigma) for text, blocks in choices for sigma in sigmas]


class Reconstructions:
    """`(images, rows)` -> one batch of reconstructions for each variant, in their order.

    The encoder runs once for each choice of blocks. The noise of an image depends on its row in the data set alone, and
    is the same for all variants: what differs between them is their doing.
    """

    def __init__(self, rae: RAE, variants: Sequence[Variant], precision: Literal["32", "16", "bf16"]) -> None:
        self.rae, self.variants, self.precision = rae, variants, precision

    def __call__(self, images: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """Yield float B 3 H W in [0, 1] scale, not clamped, of uint8 B 3 H W and their rows (B,)."""
        noise: Tensor | None = None
        for i, variant in enumerate(self.variants):
            if i == 0 or variant.layers != self.variants[i - 1].layers:
                with self._autocast(images.device):
                    latents = self.rae.encode_raw(images, variant.layers)  # B C h w
                latents = latents.float()
            noisy = latents
            if variant.sigma:
                if noise is None:
                    shape = self.rae.latent_shape
                    noise = normals(_NOISE_SEED, Purpose.LATENT_NOISE, 0, rows.tolist(), shape, images.device)
                noisy = latents + variant.sigma * noise
            with self._autocast(images.device):
                output = self.rae.decode_raw(noisy)
            yield output.float()

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context of `precision`; fp16 is for GPUs, on a CPU it is bf16, as in training."""
        if self.precision == "32":
            return nullcontext()
        half = self.precision == "16" and device.type == "cuda"
        return torch.autocast(device.type, torch.float16 if half else torch.bfloat16)
