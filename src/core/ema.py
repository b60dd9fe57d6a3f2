"""Exponential moving average (EMA) of the trained weights only."""

from copy import deepcopy

import torch
from torch import nn


class EMA:
    """Keeps `average`, a frozen copy of `module`, as avg <- decay * avg + (1 - decay) * weight.

    Create it before compiling or wrapping the module, so that it shares no code or storage with what those change.
    Parameters that are not trained are shared with the module. An update is one fused operation.
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
        """Move the average towards the current weights."""
        torch._foreach_lerp_(self._targets, self._sources, 1 - self.decay)
