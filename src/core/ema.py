"""Exponential moving average of the weights that are trained, and of nothing else."""

from copy import deepcopy

import torch
from torch import nn


class EMA:
    """Keeps `average`, a frozen twin of `module`, as avg <- decay * avg + (1 - decay) * weight.

    The twin is made before compilation or wrapping, so it never shares code or storage with what they change.
    Parameters that are not trained are shared with the source. All updates run as one fused operation.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """`decay`: in [0, 1)."""
        self.decay = decay
        self.average = deepcopy(module).eval().requires_grad_(False)
        pairs = list(zip(module.parameters(), self.average.parameters(), strict=True))
        for source, target in pairs:
            if not source.requires_grad:
                target.data = source.data
        self._sources: list[torch.Tensor] = [source for source, _ in pairs if source.requires_grad]
        self._targets: list[torch.Tensor] = [target for source, target in pairs if source.requires_grad]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        torch._foreach_lerp_(self._targets, self._sources, 1 - self.decay)
