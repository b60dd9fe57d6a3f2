"""Conversions between the three ranges an image lives in. All of them are here and nowhere else.

Legend: B batch, H height, W width. Images are B x 3 x H x W (or 3 x H x W), RGB.
    bytes   uint8 0..255        files, loaders, metrics
    unit    float [0, 1]        what `RAE.encode` takes and `RAE.decode` gives
    signed  float [-1, 1]       what LPIPS and the discriminator take
"""

from typing import Literal

import torch
from torch import Tensor

Quantization = Literal["round", "truncate"]


def bytes_to_unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 0..255 -> float [0, 1]."""
    return images.to(dtype).div_(255)


def unit_to_bytes(images: Tensor, quantization: Quantization = "round") -> Tensor:
    """Float, clamped to [0, 1] -> uint8. `truncate` is what the official code does (recipe: defect 6)."""
    scaled = images.detach().float().clamp(0, 1).mul_(255)
    if quantization == "round":
        scaled = scaled.round_()
    elif quantization != "truncate":
        raise ValueError(f"quantization must be 'round' or 'truncate', got {quantization!r}")
    return scaled.to(torch.uint8)


def unit_to_signed(images: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]."""
    return images * 2 - 1
