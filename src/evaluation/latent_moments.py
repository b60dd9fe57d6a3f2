"""Mean and variance of each element of latents, as sums that add up over batches, processes and interrupted passes.

Legend: B batch, C latent channels, h = w latent grid.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from src.core.distributed import float64_device, sum_over_ranks


class LatentMoments:
    """float64 sums of z and z^2 per element.

    var = E[z^2] - E[z]^2 loses (mean / std)^2 * 1e-16 of its precision, so latents whose mean is a hundred standard
    deviations from 0 still have 12 digits.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device | None = None) -> None:
        place = float64_device(device or torch.device("cpu"))
        self.count = 0
        self._sums = torch.zeros(2, *shape, dtype=torch.float64, device=place)  # of z and of z^2

    def update(self, latents: Tensor) -> None:
        """Take in raw latents, B C h w of any float type."""
        z = latents.detach().to(self._sums.device).double()
        self._sums[0] += z.sum(dim=0)
        self._sums[1] += z.square().sum(dim=0)
        self.count += len(z)

    def merge(self, other: Self) -> Self:
        """Add the images of `other`, in place."""
        self._sums += other._sums.to(self._sums.device)
        self.count += other.count
        return self

    def reduce(self) -> Self:
        """Replace this process's sums by those of all, in place; once, and on every process."""
        counted = torch.cat([self._sums.flatten(), self._sums.new_tensor([self.count])])
        total = sum_over_ranks(counted)
        self._sums, self.count = total[:-1].view_as(self._sums), round(total[-1].item())
        return self

    def mean(self) -> Tensor:
        """Return float64 C h w."""
        return self._sums[0] / self.count

    def var(self) -> Tensor:
        """Return float64 C h w; of the population (divided by the number of images), as numpy's."""
        return (self._sums[1] / self.count - self.mean().square()).clamp(min=0)

    def state(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return {"count": self.count, "sums": self._sums.cpu()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | None = None) -> Self:
        moments = cls(tuple(state["sums"].shape[1:]), device)
        moments._sums += state["sums"].to(moments._sums.device)
        moments.count = int(state["count"])
        return moments
