"""What becomes of a decoder's positions when it moves to another grid.

The rule: fixed sin-cos positions are computed anew for the new grid; trained ones are resampled bicubically, the row of
the cls token kept as it is.

Legend: g latents a side, D decoder width. Positions are 1 x (1 + g*g) x D.
"""

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from src.core.errors import UserError
from src.models.decoder import sincos_positions

log = logging.getLogger(__name__)

_TOLERANCE = 1e-5
"""Between float32 sines of different programs. One step of training moves a position by about the learning rate, 2e-4."""


def are_fixed(positions: Tensor) -> bool:
    """Whether they are the sin-cos ones, in float32 or rounded to half precision once."""
    fixed = sincos_positions(positions.shape[2], math.isqrt(positions.shape[1] - 1))[None]
    found = positions.detach().float().cpu()
    return any(
        torch.allclose(found, fixed.to(dtype).float(), rtol=0, atol=_TOLERANCE)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def fit_positions(positions: Tensor, grid: int, source: str) -> Tensor:
    """Return positions for `grid` x `grid` latents by the rule above; unchanged where they are for that grid already."""
    if positions.ndim != 3 or len(positions) != 1 or math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:
        raise UserError(
            f"{source}: decoder_pos_embed is {tuple(positions.shape)}; expected 1 x (1 + a square number) x width."
        )
    before = math.isqrt(positions.shape[1] - 1)
    if before == grid:
        return positions
    sizes = f"positions of a {before} x {before} grid", f"{grid} x {grid}"
    if are_fixed(positions):
        log.info("%s: %s, computed anew for %s (fixed sin-cos).", source, *sizes)
        return sincos_positions(positions.shape[2], grid)[None]
    log.warning("%s: TRAINED %s, resampled bicubically to %s; the cls row is kept.", source, *sizes)
    patches = positions[:, 1:].float().transpose(1, 2).unflatten(2, (before, before))  # 1 D g g
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), patches.flatten(2).transpose(1, 2)], dim=1)
