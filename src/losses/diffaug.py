"""Differentiable augmentation (DiffAug) of the discriminator's input. Zhao et al., arXiv 2006.10738; StyleGAN-T's variant.

All randomness comes from uniforms passed in, so the same draws give the same images however a batch is split: three per
batch switch translation, colour and cutout on, seven per sample set their parameters.

Legend: B batch, H height, W width. Images are B x 3 x H x W, float in [-1, 1] (0 is mid-grey); colour changes may exceed it.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import FunctionCtx

from src.core.settings import Settings

UNIFORMS_PER_BATCH = 3
"""Translation, colour, cutout."""
UNIFORMS_PER_SAMPLE = 7
"""Shift y, shift x, brightness, saturation, contrast, cutout y, cutout x."""
MAX_SHIFT = 0.125
"""Largest translation, as a share of height and width."""


@dataclass(frozen=True)
class Draws:
    """Random draws for one batch. `draws[a:b]` belongs to `images[a:b]`."""

    translation: bool
    colour: bool
    cutout: bool
    samples: Tensor
    """U[0, 1), B x UNIFORMS_PER_SAMPLE"""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, part: slice) -> "Draws":
        return replace(self, samples=self.samples[part])


Share = Annotated[float, Field(ge=0, le=1)]


class DiffAug(Settings):
    """Translation by up to 1/8, then brightness, saturation and contrast, then cutout."""

    prob: Share
    """Each of the three is on for a whole batch if its uniform U <= prob; 0: never."""
    cutout: Share
    """Side of the square set to grey, as a share of height and width; 0: no cutout."""

    def draw(self, batch: Tensor, samples: Tensor) -> Draws:
        """Turn uniforms U[0, 1) into draws: `batch` (UNIFORMS_PER_BATCH,) on the CPU, `samples` B x UNIFORMS_PER_SAMPLE."""
        translation, colour, cutout = (self.prob > 0 and u <= self.prob for u in batch.tolist())
        return Draws(translation, colour, cutout and self.cutout > 0, samples)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment float images of any dtype -> float32 (or float64) of the same shape. Differentiable in the images."""
        if len(images) != len(draws):
            raise ValueError(f"{len(images)} images but draws for {len(draws)}; slice both alike")
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if not (draws.translation or draws.colour or draws.cutout):
            return images
        u = draws.samples.to(images.device, non_blocking=True).unbind(1)  # seven of (B,)
        if draws.translation:
            height, width = images.shape[2:]
            images = _Translate.apply(images, _shift(u[0], height), _shift(u[1], width))
        if draws.colour:
            images = _recolour(images, *(v.to(images.dtype).view(-1, 1, 1, 1) for v in u[2:5]))
        if draws.cutout:
            images = images.masked_fill(_cutout_mask(u[5], u[6], images.shape[2:], self.cutout), 0)
        return images


def _shift(u: Tensor, size: int) -> Tensor:
    """Map U[0, 1) to a shift in pixels, uniform over -reach .. reach: int64 (B,)."""
    reach = round(size * MAX_SHIFT)
    return _to_index(u, 2 * reach + 1) - reach


def _to_index(u: Tensor, count: int) -> Tensor:
    """Map U[0, 1) to 0 .. count - 1. In float32 too: (1 - 2^-24) * count never rounds up to count."""
    return (u * count).floor().long()


class _Translate(torch.autograd.Function):
    """out[y, x] = in[y + dy, x + dx], 0 outside. The backward is the opposite shift, without a scatter."""

    @staticmethod
    def forward(ctx: FunctionCtx, images: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        ctx.save_for_backward(dy, dx)
        return _translate(images, dy, dx)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        dy, dx = ctx.saved_tensors  # type: ignore[attr-defined]
        return _translate(grad, -dy, -dx), None, None


def _translate(images: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
    rows, inside_rows = _source_index(dy, images.shape[2])  # B H
    columns, inside_columns = _source_index(dx, images.shape[3])  # B W
    # One gather per axis: the expanded indices have stride 0 and take no memory.
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    moved = moved.gather(3, columns[:, None, None, :].expand_as(images))
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]  # B 1 H W
    return moved.masked_fill_(~inside, 0)


def _source_index(shift: Tensor, size: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(size, device=shift.device) + shift[:, None]
    return index.clamp(0, size - 1), (index >= 0) & (index < size)


def _recolour(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Change brightness + U(-.5, .5); saturation * U(0, 2) around the pixel's grey; contrast * U(.5, 1.5) around the mean.

    With factors b, s, k, grey g(x) and mean m(x), the three together are one affine map of the image x:
    k s x + k (1 - s) g + (1 - k) m + b, since neither saturation nor contrast changes the mean m + b.
    """
    b, s, k = brightness - 0.5, saturation * 2, contrast + 0.5
    grey = images.mean(1, keepdim=True)  # B 1 H W
    mean = grey.mean((2, 3), keepdim=True)  # B 1 1 1
    return torch.addcmul(torch.addcmul((1 - k) * mean + b, grey, k * (1 - s)), images, k * s)


def _cutout_mask(u_y: Tensor, u_x: Tensor, size: torch.Size, share: float) -> Tensor:
    """Return the mask of a rectangle whose centre is uniform over the image: bool, B x 1 x H x W."""
    rows, columns = (_interval(u, extent, round(extent * share)) for u, extent in zip((u_y, u_x), size, strict=True))
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _interval(u: Tensor, extent: int, length: int) -> Tensor:
    # The centre of an even length lies between pixels, so it has one more position.
    start = _to_index(u, extent + 1 - length % 2)[:, None] - length // 2
    index = torch.arange(extent, device=u.device)
    return (index >= start) & (index < start + length)
