"""Compute and validate the sizes that must agree: image, patches, grid, encoder input.

An image of `image_size` px is decoded from a grid of `image_size / decoder_patch` latents per side. The encoder has to
produce exactly that grid, so its input has `grid * encoder_patch` px.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from src.core.errors import UserError
from src.core.options import LARGEST_PX

Pixels = Annotated[int, Field(ge=1, le=LARGEST_PX)]
"""Side of an image; larger values are typos that would exhaust memory."""


@dataclass(frozen=True)
class Geometry:
    """Sizes in px unless noted; created by `Geometry.of`, which checks that they agree."""

    image_size: int
    decoder_patch: int
    encoder_patch: int
    grid: int
    """Latents per side."""

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def encoder_input_size(self) -> int:
        return self.grid * self.encoder_patch

    @classmethod
    def of(
        cls,
        image_size: int,
        decoder_patch: int,
        encoder_patch: int,
        encoder_input_size: int | None = None,
        num_tokens: int | None = None,
    ) -> "Geometry":
        """Check the sizes and derive the rest. UserErrors name the keys, their values and the nearest values that fit."""
        for key, value in (("data.image_size", image_size), ("model.decoder_patch_size", decoder_patch)):
            if value <= 0:
                raise UserError(f"{key}={value}: expected a positive number of pixels.")
        if image_size % decoder_patch:
            below = image_size // decoder_patch * decoder_patch
            sizes = f"{below} and {below + decoder_patch}" if below else str(decoder_patch)
            divisors = [d for d in range(1, image_size + 1) if image_size % d == 0]
            patches = [d for d in divisors if d < decoder_patch][-1:] + [d for d in divisors if d > decoder_patch][:1]
            raise UserError(
                f"data.image_size={image_size} is not a multiple of model.decoder_patch_size={decoder_patch}. "
                f"Nearest sizes that fit: {sizes}; nearest decoder patches that divide {image_size}: "
                f"{' and '.join(map(str, patches))}."
            )
        geometry = cls(image_size, decoder_patch, encoder_patch, image_size // decoder_patch)
        if encoder_input_size is not None and encoder_input_size != geometry.encoder_input_size:
            raise UserError(
                f"model.encoder_input_size={encoder_input_size} does not fit data.image_size={image_size} with "
                f"model.decoder_patch_size={decoder_patch}: a grid of {geometry.grid} x {geometry.grid} latents and an "
                f"encoder patch of {encoder_patch} px need {geometry.encoder_input_size}. Set model.encoder_input_size=null "
                f"to have it derived, or ={geometry.encoder_input_size}."
            )
        if num_tokens is not None and num_tokens != geometry.tokens:
            raise UserError(
                f"model.encoder_params.num_tokens={num_tokens} does not fit data.image_size={image_size} with "
                f"model.decoder_patch_size={decoder_patch}: the grid is {geometry.grid} x {geometry.grid} = "
                f"{geometry.tokens} tokens. {_sizes_for_tokens(num_tokens, image_size, decoder_patch)}"
            )
        return geometry


def _sizes_for_tokens(tokens: int, image_size: int, decoder_patch: int) -> str:
    side = round(tokens**0.5)
    if side * side != tokens:
        return f"{tokens} is not a square number; drop the key or set it to {(image_size // decoder_patch) ** 2}."
    fits = [f"data.image_size={side * decoder_patch}"]
    if image_size % side == 0:
        fits.append(f"model.decoder_patch_size={image_size // side}")
    return f"Drop the key, or set {' or '.join(fits)}."
