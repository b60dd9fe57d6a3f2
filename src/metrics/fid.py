"""Compute the Frechet distance (FID) between two sets of features from statistics that add up over batches and ranks.

Heusel et al., arXiv 1706.08500, eq. 6. All computations are in float64.

Legend: B batch, D feature dimensions, R rank of a covariance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from src.core.distributed import sum_over_ranks
from src.core.errors import UserError
from src.core.files import replacing
from src.metrics.npz import opened_npz, scalar


@dataclass(frozen=True)
class Gaussian:
    """Moments from a reference file. `features` names the feature network, if the file states it."""

    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64
    count: int | None = None
    features: str | None = None


class FeatureStatistics:
    """Count, mean and scatter (sum of outer products about the mean) of feature vectors; memory D x D for any count.

    Statistics of several ranks combine to those of a single pass (Chan, Golub, LeVeque 1979). Sums about the mean avoid the
    cancellation of raw outer products: features of a weak network vary by a hundredth of their mean.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        """(D,) float64."""
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divided by count - 1 as in published FID. UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"FID needs at least 2 images to have a covariance, got {self.count}. Score more images.")
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Add features (B, D) of any float dtype and device."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be B x {len(self.mean)}, got {tuple(features.shape)}")
        if len(features) == 0:
            return
        rows = features.detach().to(self.mean.device).double()
        mean = rows.mean(dim=0)
        shift, total = mean - self.mean, self.count + len(rows)
        # the shift between the two means adds one more row to the scatter
        bridge = shift * (self.count * len(rows) / total) ** 0.5
        rows = torch.cat([rows - mean, bridge[None]])  # B+1 D
        self._scatter.addmm_(rows.T, rows)
        self.mean += shift * (len(rows) - 1) / total
        self.count = total

    def reduce(self) -> Self:
        """Replace this rank's statistics by those of all ranks, in place. Call once, on every rank."""
        sums = sum_over_ranks(torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])]))
        total = round(sums[-1].item())
        if total == 0:
            return self
        mean = sums[:-1] / total
        self._scatter = sum_over_ranks(self._scatter.addr(self.mean - mean, self.mean - mean, alpha=self.count))
        self.mean, self.count = mean, total
        return self


Moments = Gaussian | FeatureStatistics
"""Has `mean` (D,), `covariance` (D, D, unbiased) and `count` (None if unknown)."""


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); nan if a moment is not finite.

    The trace of the root is the sum of the singular values of A^T B with C_a = A A^T and C_b = B B^T. This avoids the root
    of an unsymmetric, often singular matrix, so it works for few images too (the official scipy root is off by 1e-5).
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"Can't compare statistics of {len(a.mean)} and {len(b.mean)} features: they come from different networks. "
            "Use a reference made with the same Inception weights (2048 features for the published one)."
        )
    (mean_a, cov_a), (mean_b, cov_b) = ((m.mean.cpu().double(), m.covariance.cpu().double()) for m in (a, b))
    if not all(torch.isfinite(x).all() for x in (mean_a, cov_a, mean_b, cov_b)):
        return float("nan")
    overlap = torch.linalg.svdvals(_factor(cov_a, a.count).T @ _factor(cov_b, b.count)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(distance.item(), 0.0)  # equal sets may round below 0


def _factor(covariance: Tensor, count: int | None) -> Tensor:
    """Return D x R with factor @ factor.T = covariance; eigenvalues that are zero up to rounding are dropped.

    The covariance of `count` vectors has a rank below `count`. If `count` is small, `count` random combinations of its
    columns span its range (Halko, Martinsson & Tropp, arXiv 0909.4061), and the eigenproblem is count x count.
    """
    covariance = (covariance + covariance.T) / 2
    dim, basis = len(covariance), None
    if count is not None and 2 * count < dim:
        mixing = torch.randn(dim, count, dtype=covariance.dtype, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(covariance @ mixing).Q  # D count
        inside = basis.T @ covariance @ basis
        if (covariance.trace() - inside.trace()).abs() > 1e-9 * covariance.trace():
            basis = None  # made from more vectors than `count`
    values, vectors = torch.linalg.eigh(covariance if basis is None else inside)
    keep = values > dim * torch.finfo(values.dtype).eps * values.abs().max()
    factor = vectors[:, keep] * values[keep].sqrt()
    return factor if basis is None else basis @ factor


def few_images_warning(count: int | None, dim: int) -> str | None:
    """Return a warning if the covariance can't have full rank; None for enough images or an unknown count."""
    if count is None or count >= dim:
        return None
    return (
        f"FID from {count:,} images, fewer than its {dim:,} feature dimensions: biased upwards, and comparable only with "
        "scores of the same number of the same images. Published scores use 50,000."
    )


def save_npz(
    path: str | Path,
    moments: Moments,
    features: str,
    facts: Mapping[str, str | int] | None = None,
    spatial: Moments | None = None,
) -> None:
    """Write `mu` and `sigma` as every FID tool reads them, and `mu_s` and `sigma_s` of `spatial` features as in ADM's suite.
    Other tools ignore the rest: the name of the feature network, `count`, and `facts` (how the images were prepared, see
    `src.metrics.reference.Preparation`)."""
    count = {} if moments.count is None else {"count": moments.count}
    arrays: dict[str, Any] = {}
    for end, part in (("", moments), ("_s", spatial)):
        if part is not None:
            arrays |= {f"mu{end}": part.mean.cpu().numpy(), f"sigma{end}": part.covariance.cpu().numpy()}
    with replacing(path) as file:
        np.savez(file, **arrays, features=features, **count, **(facts or {}))  # type: ignore[arg-type]  # numpy's stub


def load_npz(path: str | Path, names: tuple[str, str] = ("mu", "sigma")) -> Gaussian:
    """Read `mu` (D,) and `sigma` (D, D), or the arrays called `names`, and `count` and `features` if present.

    Raises UserError for anything else.
    """
    with opened_npz(path) as archive:
        missing = [name for name in names if name not in archive.files]
        if missing:
            raise UserError(
                f"{path} has no {' and no '.join(missing)}, only {archive.files}. Expected `{names[0]}` and `{names[1]}`."
            )
        mu, sigma = (archive[name] for name in names)
        count, features = scalar(archive, "count", int), scalar(archive, "features", str)
    numbers = all(np.issubdtype(x.dtype, np.floating) and np.isfinite(x).all() for x in (mu, sigma))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not numbers or not np.allclose(sigma, sigma.T, atol=1e-6):
        raise UserError(
            f"{path}: {names[0]} {mu.dtype} {mu.shape} and {names[1]} {sigma.dtype} {sigma.shape} are not a mean and a covariance; "
            "expected finite floats of shapes (D,) and (D, D), sigma symmetric."
        )
    return Gaussian(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double(), count, features)
