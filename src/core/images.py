"""Convert images between the three value ranges (done only here); lay out contact sheets; write PNG files.

Legend: B batch, H height, W width; R rows of a sheet, N images in a row. Images are B x 3 x H x W (or 3 x H x W), RGB.
    bytes   uint8 0..255        files, loaders, metrics
    unit    float [0, 1]        input of `RAE.encode`, output of `RAE.decode`
    signed  float [-1, 1]       input of LPIPS and the discriminator
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from src.core.files import replacing

Quantization = Literal["round", "truncate"]
GAP_PX, WHITE = 2, 255
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per RGB channel, of pixels in [0, 1]."""


def bytes_to_unit(images: Tensor) -> Tensor:
    """Convert uint8 0..255 -> float32 [0, 1]."""
    return images.float().div_(255)


def unit_to_bytes(images: Tensor, quantization: Quantization = "round") -> Tensor:
    """Clamp floats to [0, 1] and convert -> uint8. `truncate`: as the official code does (docs/recipe.md)."""
    scaled = images.detach().float().clamp(0, 1).mul_(255)
    return (scaled.round_() if quantization == "round" else scaled).to(torch.uint8)


def unit_to_signed(images: Tensor) -> Tensor:
    """Convert [0, 1] -> [-1, 1]."""
    return images * 2 - 1


def bytes_to_signed(images: Tensor) -> Tensor:
    """Convert uint8 0..255 -> float32 [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def sheet(rows: Sequence[Tensor]) -> Tensor:
    """Lay out R rows of uint8 N x 3 x H x W, same H and W -> uint8 3 x height x width, with thin white gaps."""
    columns, height, width = max(len(row) for row in rows), *rows[0].shape[-2:]
    size = (len(rows) * (height + GAP_PX) - GAP_PX, columns * (width + GAP_PX) - GAP_PX)
    canvas = torch.full((3, *size), WHITE, dtype=torch.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row.cpu()):
            top, left = r * (height + GAP_PX), c * (width + GAP_PX)
            canvas[:, top : top + height, left : left + width] = image
    return canvas


def difference(a: Tensor, b: Tensor, gain: float = 4.0) -> Tensor:
    """Return |a - b| * `gain`, clamped, uint8 in and out; shows where a reconstruction is wrong."""
    return ((a.int() - b.int()).abs() * gain).clamp_(max=255).to(torch.uint8)


def save_png(image: Tensor, path: Path) -> None:
    """Write uint8 3 x H x W as PNG, atomically."""
    with replacing(path, durable=False) as file:
        Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, format="PNG")
