"""Statistics to score against: from a ready file, an npz of images, or images on the fly."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from src.errors import UserError
from src.metrics.fid import FeatureStatistics, Gaussian, Moments, load_npz
from src.metrics.image_npz import ImageNpz
from src.metrics.inception import InceptionFeatures
from src.metrics.npz import npz_names
from src.metrics.ranks import float64_device


def add_features(statistics: FeatureStatistics, inception: InceptionFeatures, images: Tensor, batch_size: int) -> None:
    """Take uint8 images B x 3 x H x W into `statistics`, `batch_size` at a time through the network."""
    for chunk in images.split(batch_size):
        statistics.update(inception(chunk))


def image_statistics(batches: Iterable[Tensor], inception: InceptionFeatures, batch_size: int) -> FeatureStatistics:
    """Statistics of uint8 batches B x 3 x H x W, on this rank; call `reduce` on them where there are several."""
    statistics = FeatureStatistics(inception.feature_dim, float64_device(inception.device))
    for images in batches:
        add_features(statistics, inception, images, batch_size)
    return statistics


def load_reference(
    path: str | Path, inception: InceptionFeatures, batch_size: int, rank: int = 0, world_size: int = 1
) -> Moments:
    """`mu` and `sigma` of an npz where it has them, else those of its images `arr_0`.

    With several ranks each reads its share of the images and all get the whole. UserError for other files and for
    statistics that another network made (as far as the file says: ours do, others only by their dimension).
    """
    names = set(npz_names(path))
    if {"mu", "sigma"} <= names:
        gaussian = load_npz(path)
        _check_network(path, gaussian, inception)
        return gaussian
    if "arr_0" not in names:
        raise UserError(f"{path} holds {sorted(names)}; a reference has `mu` and `sigma`, or uint8 images in `arr_0`.")
    statistics = image_statistics(ImageNpz(path).batches(batch_size, rank, world_size), inception, batch_size)
    return statistics.reduce() if world_size > 1 else statistics


def _check_network(path: str | Path, gaussian: Gaussian, inception: InceptionFeatures) -> None:
    dim = len(gaussian.mean)
    if dim != inception.feature_dim:
        raise UserError(
            f"{path} has statistics of {dim} features, the Inception network gives {inception.feature_dim}."
        )
    if gaussian.features is not None and gaussian.features != inception.name:
        raise UserError(
            f"{path} was made with the features {gaussian.features!r}, this run uses {inception.name!r}: the distance "
            "between them means nothing. Make the reference again with the weights of this run."
        )
    if gaussian.features is None and inception.untrained:
        raise UserError(
            f"{path} comes from another tool, thus from the trained Inception network: nothing to compare untrained "
            "features with. Give this run the Inception weights, or make a reference with its untrained ones."
        )
