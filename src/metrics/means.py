"""Means of named per-image values, kept as float64 sums that add up over batches and ranks."""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from src.core.distributed import sum_over_ranks


class RunningMeans:
    """`RunningMeans(["psnr", "ssim"])`: the names are fixed, so that a rank without images fits the others."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.count = 0
        self._sums = torch.zeros(len(self.names), dtype=torch.float64)

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Take in one value per image for every name, each (B,)."""
        sizes = {name: tuple(value.shape) for name, value in values.items()}
        if set(values) != set(self.names) or len(set(sizes.values())) > 1:
            raise ValueError(f"expected {self.names}, each (B,), got {sizes}")
        stacked = torch.stack([values[name].detach().cpu().double() for name in self.names])  # names B
        self._sums += stacked.sum(dim=1)
        self.count += stacked.shape[1]

    def reduce(self) -> Self:
        """Replace this rank's sums by those of all ranks, in place; once, and on every rank."""
        total = sum_over_ranks(torch.cat([self._sums, self._sums.new_tensor([self.count])]))
        self._sums, self.count = total[:-1], round(total[-1].item())
        return self

    def means(self) -> dict[str, float]:
        """Return the mean of each name over the images so far; nan without images."""
        sums = zip(self.names, self._sums.tolist(), strict=True)
        return {name: total / self.count if self.count else float("nan") for name, total in sums}
