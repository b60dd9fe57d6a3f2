"""Score generated images as ADM's evaluation suite does: gFID, sFID, Inception Score, precision and recall.

- gFID, sFID: Frechet distance (`src/metrics/fid.py`) of pooled and of spatial Inception features; sFID: Nash et al.,
  arXiv 2103.03841.
- Inception Score: Salimans et al., arXiv 1606.03498; mean over splits of 5,000 consecutive images.
- Precision and recall: Kynkaanniemi et al., arXiv 1904.06991; k = 3, on pooled features.

Other feature networks give the Frechet distance, precision and recall only (Stein et al., arXiv 2306.04675).

Legend: B batch, N generated images, M reference images, F pooled features, K classes.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from src.core.distributed import Process, float64_device, gather_on_main, sum_over_ranks
from src.core.errors import UserError
from src.metrics.features import FeatureNetwork, score_name
from src.metrics.fid import FeatureStatistics, Moments, few_images_warning, frechet_distance, load_npz
from src.metrics.inception_network import TF_CLASSES
from src.metrics.npz import ImageNpz, opened_npz
from src.metrics.reference import ALONE, Preparation, stored_moments

log = logging.getLogger(__name__)

SPLIT_IMAGES = 5000
NEIGHBOURS = 3
CHUNK_NUMBERS = 2**24  # distances computed at once: 128 MiB in float64


class InceptionScore:
    """exp of the mean KL divergence between an image's class distribution and its split's; mean over splits.

    Keeps only sums, which add up over batches and ranks. `images`: the number of images or an upper bound.
    """

    def __init__(self, images: int, classes: int = TF_CLASSES, split_images: int = SPLIT_IMAGES) -> None:
        self.split_images = split_images
        splits = -(-images // split_images)
        self._sums = torch.zeros(splits, classes + 2, dtype=torch.float64)  # probabilities, entropy, images

    def update(self, logits: Tensor, positions: Tensor) -> None:
        """Add logits B x K of the images with indices `positions` (B,) in the whole set."""
        probabilities = logits.detach().cpu().double().softmax(dim=1)
        entropy = torch.special.entr(probabilities).sum(dim=1, keepdim=True)
        rows = torch.cat([probabilities, entropy, torch.ones_like(entropy)], dim=1)
        self._sums.index_add_(0, positions.cpu() // self.split_images, rows)

    def reduce(self) -> None:
        """Add up the sums of all ranks. Call once, on every rank."""
        self._sums = sum_over_ranks(self._sums)

    def compute(self) -> float:
        sums = self._sums[self._sums[:, -1] > 0]
        means = sums[:, :-1] / sums[:, -1:]
        divergence = torch.special.entr(means[:, :-1]).sum(dim=1) - means[:, -1]
        return divergence.exp().mean().item()


def neighbour_distances(features: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Return the distance of each of `features` N x F to its k-th nearest neighbour among the others, (N,).

    Computes the N x N distances in chunks, so the memory besides the features is bounded.

    Raises:
        UserError: k images or fewer.
    """
    if len(features) <= k:
        raise UserError(
            f"Precision and recall use the {k} nearest neighbours of each image among the others, so they need at least "
            f"{k + 1} images on each side; got {len(features)}. Give more images."
        )
    # The nearest is the image itself. Not `kthvalue`: on a GPU it raises under trainer.deterministic=true.
    parts = _distances(features, features)
    return torch.cat([part.topk(k + 1, dim=1, largest=False).values[:, -1] for part in parts])


def share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the share of `points` N x F that lie within `radii` (M,) of any of `centres` M x F."""
    inside = [(part <= radii).any(dim=1) for part in _distances(points, centres)]
    return torch.cat(inside).sum().item() / len(points)  # not `mean`, which rounds differently on a GPU


def precision_recall(generated: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Return precision (share of `generated` N x F within the k-NN radius of a `reference` image, M x F) and recall (swapped)."""
    generated, reference = generated.double(), reference.double()
    of_reference, of_generated = neighbour_distances(reference, k), neighbour_distances(generated, k)
    return share_inside(generated, reference, of_reference), share_inside(reference, generated, of_generated)


def _distances(rows: Tensor, columns: Tensor) -> Iterable[Tensor]:
    for part in rows.split(max(1, CHUNK_NUMBERS // len(columns))):
        yield torch.cdist(part, columns, compute_mode="use_mm_for_euclid_dist")


class ImageStatistics:
    """Statistics of a set of images for all scores. `update` with batches, then `reduce` once on every rank.

    Args:
        images: the number of images or an upper bound, for the splits of the Inception Score. 0: no Inception Score.
        keep: keep the features of each image, for precision and recall (400 MB for 50,000 images).
        spatial: collect spatial features for sFID, if the network has them.

    Memory besides the kept features: one or two covariances.
    """

    def __init__(
        self, network: FeatureNetwork, batch_size: int, images: int = 0, keep: bool = True, spatial: bool = True
    ) -> None:
        self.network, self.batch_size, self.keep = network, batch_size, keep
        device = float64_device(network.device)
        self.pool = FeatureStatistics(network.feature_dim, device)
        self.spatial = FeatureStatistics(network.spatial_dim, device) if spatial and network.spatial_dim else None
        self.inception_score = InceptionScore(images) if images and network.spatial_dim else None
        self._features: list[Tensor] = []

    @property
    def count(self) -> int:
        return self.pool.count

    @property
    def features(self) -> Tensor:
        """N x F float32 on the CPU; after `reduce`, rank 0 has those of all ranks."""
        return torch.cat(self._features) if self._features else torch.empty(0, self.network.feature_dim)

    def update(self, images: Tensor, positions: Tensor | None = None) -> None:
        """Add uint8 images B x 3 x H x W, and for the Inception Score their indices (B,) in the whole set."""
        for start in range(0, len(images), self.batch_size):
            outputs = self.network.outputs(images[start : start + self.batch_size])
            self.pool.update(outputs.pool)
            if self.keep:
                self._features.append(outputs.pool.cpu())
            if self.spatial is not None and outputs.spatial is not None:
                self.spatial.update(outputs.spatial)
            if self.inception_score is not None and positions is not None and outputs.logits is not None:
                self.inception_score.update(outputs.logits, positions[start : start + self.batch_size])

    def reduce(self) -> Self:
        for part in (self.pool, self.spatial, self.inception_score):
            if part is not None:
                part.reduce()
        if self.keep:
            self._features = [rows for rank in gather_on_main(self._features) for rows in rank]
        return self


@dataclass(frozen=True)
class GenerationReference:
    """Statistics to score generated images against. No `spatial`: no sFID; no `features`: no precision and recall."""

    pool: Moments
    spatial: Moments | None = None
    features: Tensor | None = None  # M F

    @classmethod
    def of(cls, statistics: ImageStatistics) -> Self:
        return cls(statistics.pool, statistics.spatial, statistics.features if statistics.keep else None)


def load_reference(
    path: str | Path,
    network: FeatureNetwork,
    batch_size: int,
    wanted: Preparation,
    remedy: str = "",
    process: Process = ALONE,
    pool_only: bool = False,
) -> GenerationReference:
    """Read an npz with `mu`, `sigma`, `mu_s`, `sigma_s` and images `arr_0` (ADM's), or with some of them (ours).

    Uses stored moments if present and computes the rest from the images; without images, warns and leaves it out. Call on all
    ranks: each reads a share of the images. Features are complete on rank 0, moments on all ranks.

    Args:
        wanted, remedy: see `stored_moments`, which also raises the errors.
        pool_only: read only what the Frechet distance needs.
    """
    pool: Moments | None = stored_moments(path, network, wanted, remedy)
    with opened_npz(path) as archive:
        names = set(archive.files)
    stored = pool is not None and network.spatial_dim and {"mu_s", "sigma_s"} <= names and not pool_only
    spatial: Moments | None = load_npz(path, ("mu_s", "sigma_s")) if stored else None
    features = None
    if "arr_0" in names and not (pool_only and pool is not None):
        made = ImageStatistics(network, batch_size, keep=not pool_only, spatial=not pool_only)
        for _, images in ImageNpz(path).batches(batch_size, process.rank, process.world):
            made.update(images)
        made.reduce()
        pool, spatial, features = pool or made.pool, spatial or made.spatial, made.features
    missing = ["sFID"] * bool(network.spatial_dim and spatial is None) + ["precision and recall"] * (features is None)
    if missing and not pool_only:
        log.warning(
            "%s has no images (`arr_0`), so there is no %s. A reference of images has everything: "
            "`python src/make_reference.py --kind images`. %s", path, ", and no ".join(missing), remedy,
        )  # fmt: skip
    assert pool is not None
    return GenerationReference(pool, spatial, features)


def compute_scores(
    generated: ImageStatistics, reference: GenerationReference, device: torch.device | str = "cpu"
) -> dict[str, float | int]:
    """Return `gfid`, `sfid`, `inception_score`, `precision`, `recall` (those available) and `images`. Call on rank 0.

    For other networks the keys follow `score_name`. `device` computes the distances of precision and recall.
    """
    if warning := few_images_warning(generated.count, generated.network.feature_dim):
        log.warning("%s", warning)
    scores = {"gfid": frechet_distance(reference.pool, generated.pool)}
    if reference.spatial is not None and generated.spatial is not None:
        scores["sfid"] = frechet_distance(reference.spatial, generated.spatial)
    if generated.inception_score is not None:
        scores["inception_score"] = generated.inception_score.compute()
    if reference.features is not None:
        pair = generated.features.to(device), reference.features.to(device)
        if min(map(len, pair)) > NEIGHBOURS:
            scores["precision"], scores["recall"] = precision_recall(*pair)
        else:
            log.warning("Fewer than %d images on one side: no precision and recall.", NEIGHBOURS + 1)
    return {score_name(name, generated.network): value for name, value in scores.items()} | {"images": generated.count}
