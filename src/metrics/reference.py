"""Read reference files to score against: their moments, and how their images were prepared."""

import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self

import torch

from src.core.distributed import Process
from src.core.errors import UserError
from src.metrics.features import INCEPTION, FeatureNetwork
from src.metrics.fid import Gaussian, load_npz
from src.metrics.npz import ImageNpz, opened_npz, scalar

log = logging.getLogger(__name__)

ALONE = Process(torch.device("cpu"))


@dataclass(frozen=True)
class Preparation:
    """How a set of images was chosen and prepared; stored in references. rFID depends on it as much as on the model (the same
    decoder scores 0.57, and 1.8 to 2.1 against images prepared differently). None: unknown."""

    image_size: int | None = None  # px, side of the centre crop
    exif: str | None = None  # apply or ignore
    split: str | None = None  # its name, `held_out` or `all`
    fingerprint: str | None = None  # of the dataset
    available: int | None = None  # images of the split
    selected: int | None = None  # of these, as requested; `count` is the number that could be decoded

    def facts(self) -> dict[str, str | int]:
        """Return the known fields by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of_file(cls, path: str | Path) -> Self:
        """Read the preparation stored in an npz; all None if another tool wrote it."""
        texts = ("exif", "split", "fingerprint")
        with opened_npz(path) as archive:
            kinds = {field.name: str if field.name in texts else int for field in fields(cls)}
            return cls(**{name: scalar(archive, name, kind) for name, kind in kinds.items()})  # type: ignore[arg-type]

    def differences(self, here: Self) -> list[str]:
        """Describe the fields, other than the size, that this reference and the evaluation `here` both know but differ in."""
        found = []
        if _differ(self.exif, here.exif):
            found.append(f"EXIF orientation {self.exif}, here {here.exif} (--exif)")
        mine, theirs = (self.fingerprint, self.available), (here.fingerprint, here.available)
        same_images = None not in mine and mine == theirs  # `val` and `validation` may be names of one folder
        if _differ(self.split, here.split) and not same_images:
            found.append(f"the split {self.split!r}, here {here.split!r} (--split)")
        if _differ(self.fingerprint, here.fingerprint):
            found.append(f"data with the fingerprint {self.fingerprint}, here {here.fingerprint} (other files)")
        elif _differ(self.available, here.available) and not _differ(self.split, here.split):
            found.append(f"{self.available:,} images to choose from, here {here.available:,}")
        if _differ(self.selected, here.selected):
            found.append(f"{self.selected:,} images, here {here.selected:,} (--num_samples)")
        return found


def stored_moments(path: str | Path, network: FeatureNetwork, wanted: Preparation, remedy: str = "") -> Gaussian | None:
    """Read `mu` and `sigma` from an npz; None if it has only images, `arr_0`.

    `wanted` describes the images to score: another image size raises UserError; any other difference, or a file that doesn't
    state its size, logs a warning. `remedy`: what to type instead. Also raises UserError for other files, and for statistics
    of another network (our files name it, others show it only by their dimension).
    """
    with opened_npz(path) as archive:
        names = set(archive.files)
    moments = load_npz(path) if {"mu", "sigma"} <= names else None
    if moments is not None:
        _check_network(path, moments, network)
    elif "arr_0" not in names:
        raise UserError(f"{path} holds {sorted(names)}; a reference has `mu` and `sigma`, or uint8 images in `arr_0`.")
    stated, px = Preparation.of_file(path), wanted.image_size
    images = ImageNpz(path) if "arr_0" in names else None  # the ADM suite's own files hold statistics and images
    size = (stated.image_size, stated.image_size) if images is None else images.shape[1:3]
    if None in size:
        log.warning(
            "%s does not state the size of its images: another tool or an older version made it. The score is meaningful "
            "only if they were centre crops of %d px, prepared like those of this evaluation. %s",
            path, px, remedy,
        )  # fmt: skip
    elif size != (px, px):
        raise UserError(
            f"{path} was made from images of {size[0]} x {size[1]} px, this evaluation has {px} x {px} px: the distance "
            f"between them says nothing about the model. {remedy}"
        )
    if stated.selected is None:
        stated = replace(stated, selected=len(images or ()) if moments is None else moments.count)
    if differences := stated.differences(wanted):
        log.warning(
            "%s was prepared differently from the images of this evaluation, which changes the score. "
            "The reference: %s. %s",
            path, "; ".join(differences), remedy,
        )  # fmt: skip
    return moments


def _differ(there: str | int | None, here: str | int | None) -> bool:
    """Return whether both are known and differ."""
    return there is not None and here is not None and there != here


def _check_network(path: str | Path, gaussian: Gaussian, network: FeatureNetwork) -> None:
    there = gaussian.features
    if there not in (None, network.name):
        raise UserError(
            f"{path} was made with the features {there!r}, this run uses {network.name!r}: the distance between them is "
            "meaningless. Choose the features of the file with --features, or make the reference again with those of this run."
        )
    if (dim := len(gaussian.mean)) != network.feature_dim:
        raise UserError(f"{path} has statistics of {dim} features, {network.name} gives {network.feature_dim}.")
    if there is None and (network.untrained or network.space != INCEPTION):
        raise UserError(
            f"{path} does not state its feature network: it comes from another tool, and therefore from the trained "
            f"Inception network, but this run uses {network.name!r}. Make a reference with the features of this run."
        )
