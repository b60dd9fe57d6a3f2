"""Compute PSNR and SSIM per image, on 8-bit images, and means of per-image values.

Legend: B batch, H, W image px. Images are uint8 B x 3 x H x W.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from src.core.distributed import float64_device, sum_over_ranks
from src.core.errors import UserError
from src.core.images import bytes_to_unit

MAX_PSNR_DB = 100.0  # of identical images; a cap, so that one of them doesn't make a mean infinite
SSIM_SIGMA_PX, SSIM_RADIUS_PX = 1.5, 5  # window 11 x 11
SSIM_CHUNK = 8  # images at a time: bounds the memory of the float maps, and fits a CPU's cache
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # data range 1


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return (B,) float64 dB, 10 log10(255^2 / mean squared error over all values of an image), at most 100.

    The squared error is summed in integers, so it is exact. Identical images give 100 dB. The PSNR of a dataset is the
    mean of these values (not the PSNR of the mean error).
    """
    _check(a, b)
    squared = (a.int() - b.int()).square_().flatten(1).sum(dim=1, dtype=torch.int64)
    squared = squared.to(float64_device(a.device)).double()
    return (10 * torch.log10(255**2 * a[0].numel() / squared)).clamp(max=MAX_PSNR_DB)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return (B,) float32: Wang et al. 2004, eq. 13, per RGB channel on the [0, 1] images, mean over channels and positions.

    Equal to torchmetrics' StructuralSimilarityIndexMeasure(data_range=1.0): Gaussian window of 11 x 11 px and sigma
    1.5, reflected edges, K = (.01, .03). Computed as two passes of weighted shifts, in a tenth of the time.
    UserError for images of fewer than 6 px per side (can't be reflected).
    """
    _check(a, b)
    if min(a.shape[-2:]) <= SSIM_RADIUS_PX:
        raise UserError(f"SSIM needs images of at least {SSIM_RADIUS_PX + 1} px a side, got {tuple(a.shape[-2:])}")
    pairs = zip(a.split(SSIM_CHUNK), b.split(SSIM_CHUNK), strict=True)
    return torch.cat([_ssim(bytes_to_unit(x), bytes_to_unit(y)) for x, y in pairs])


class RunningMeans:
    """Means of named per-image values, kept as float64 sums that add up over batches and ranks.

    `RunningMeans(["psnr", "ssim"])`: the names are fixed, so that a rank without images has the same sums.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.count = 0
        self._sums = torch.zeros(len(self.names), dtype=torch.float64)

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add one value per image for every name, each (B,)."""
        sizes = {name: tuple(value.shape) for name, value in values.items()}
        if set(values) != set(self.names) or len(set(sizes.values())) > 1:
            raise ValueError(f"expected {self.names}, each (B,), got {sizes}")
        found = (values[name].detach() for name in self.names)
        # One copy for all: each copy from a GPU is a sync.
        stacked = torch.stack([value.to(float64_device(value.device)).double() for value in found]).cpu()  # names B
        self._sums += stacked.sum(dim=1)
        self.count += stacked.shape[1]

    def reduce(self) -> Self:
        """Replace this rank's sums by those of all ranks, in place. Call once, on every rank."""
        total = sum_over_ranks(torch.cat([self._sums, self._sums.new_tensor([self.count])]))
        self._sums, self.count = total[:-1], round(total[-1].item())
        return self

    def means(self) -> dict[str, float]:
        """Return the mean of each name over the images so far; nan without images."""
        sums = zip(self.names, self._sums.tolist(), strict=True)
        return {name: total / self.count if self.count else float("nan") for name, total in sums}


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the SSIM of two float [0, 1] batches B x 3 x H x W, (B,)."""
    # only the sum of the variances is needed, so four blurs suffice
    mean_x, mean_y, squares, product = _blur(torch.stack([x, y, x * x + y * y, x * y]))  # each B 3 H W
    means, mean_product = mean_x.square() + mean_y.square(), mean_x * mean_y
    variances, covariance = (squares - means).clamp_(min=0), product - mean_product
    similarity = (2 * mean_product + SSIM_C1) * (2 * covariance + SSIM_C2)
    similarity /= (means + SSIM_C1) * (variances + SSIM_C2)
    return similarity.flatten(1).mean(dim=1)


def _blur(images: Tensor) -> Tensor:
    """Blur the last two axes with the Gaussian window of SSIM; same size."""
    radius = SSIM_RADIUS_PX
    weights = [math.exp(-((i - radius) ** 2) / (2 * SSIM_SIGMA_PX**2)) for i in range(2 * radius + 1)]
    weights = [weight / sum(weights) for weight in weights]
    height, width = images.shape[-2:]
    padded = functional.pad(images.flatten(0, 1), (radius,) * 4, mode="reflect")
    rows = _weighted([padded[..., i : i + width] for i in range(len(weights))], weights)
    blurred = _weighted([rows[..., i : i + height, :] for i in range(len(weights))], weights)
    return blurred.unflatten(0, images.shape[:2])


def _weighted(parts: list[Tensor], weights: list[float]) -> Tensor:
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(
            f"expected two batches of uint8 images B x 3 x H x W of one size, got {a.dtype} {tuple(a.shape)} and "
            f"{b.dtype} {tuple(b.shape)}"
        )
