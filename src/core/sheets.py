"""Contact sheets: rows of equally large images with a thin gap, written as PNG.

Legend: R rows, N images in a row. Images are uint8 N x 3 x H x W.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from src.core.files import replacing

GAP_PX = 2
WHITE = 255


def sheet(rows: Sequence[Tensor]) -> Tensor:
    """R rows of uint8 N x 3 x H x W, all of one size -> uint8 3 x height x width, white gaps."""
    columns, height, width = max(len(row) for row in rows), *rows[0].shape[-2:]
    canvas = torch.full(
        (3, len(rows) * (height + GAP_PX) - GAP_PX, columns * (width + GAP_PX) - GAP_PX), WHITE, dtype=torch.uint8
    )
    for r, row in enumerate(rows):
        for c, image in enumerate(row.cpu()):
            top, left = r * (height + GAP_PX), c * (width + GAP_PX)
            canvas[:, top : top + height, left : left + width] = image
    return canvas


def difference(a: Tensor, b: Tensor, gain: float = 4.0) -> Tensor:
    """|a - b| times `gain`, uint8 in and out; shows where a reconstruction errs."""
    return ((a.int() - b.int()).abs() * gain).clamp_(max=255).to(torch.uint8)


def save_png(image: Tensor, path: Path) -> None:
    """uint8 3 x H x W -> PNG; a reader never sees half a file."""
    with replacing(path, durable=False) as file:
        Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, format="PNG")
