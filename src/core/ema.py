"""Exponential moving average of the weights that are trained, and of nothing else."""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn


class EMA:
    """Keeps `average`, a frozen twin of `module`, as avg <- decay * avg + (1 - decay) * weight.

    The twin is made before compilation or wrapping, so it never shares code or storage with what they change.
    Parameters that are not trained are shared with the source. All updates run as one fused operation.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.average = deepcopy(module).eval().requires_grad_(False)
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []
        for source, target in _pairs(module, self.average):
            if source.requires_grad:
                self._targets.append(target)
                self._sources.append(source)
            else:
                target.data = source.data

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._targets, self._sources, 1 - self.decay)


def _pairs(module: nn.Module, twin: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    return zip(module.parameters(), twin.parameters(), strict=True)
