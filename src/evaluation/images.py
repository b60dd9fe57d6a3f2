"""The images of an evaluation: any kind of data set, opened without being told its kind."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.core.errors import UserError
from src.core.weights import resolve
from src.data import dummy
from src.data.dataset import EvaluationDataset, EvaluationTransform
from src.data.decode import Decoder
from src.data.loader import EvaluationLoader, WorkerOptions
from src.data.order import evaluation_rows, split_rows
from src.data.sources import Source
from src.data.splits import VALIDATION_SPLITS, DataFolder

log = logging.getLogger(__name__)

ALL, HELD_OUT = "all", "held_out"
MAX_MEGAPIXELS = 80.0


@dataclass(frozen=True)
class Images:
    """Rows of a source that are evaluated."""

    folder: Path
    source: Source
    rows: np.ndarray  # (n,) int64
    split: str
    """The split's name, `held_out` or `all`."""

    def description(self) -> dict[str, Any]:
        return {
            "data_dir": str(self.folder),
            "split": self.split,
            "available": len(self.rows),
            "fingerprint": self.source.fingerprint(),
        }


def open_images(data_dir: str | Path, split: str | None, trained_on: Mapping[str, Any] | None) -> Images:
    """
    Args:
        split: a name, `held_out`, `all`, or None: the validation split, else what training held out, else all.
        trained_on: the node `data:` of the run that trained the model; None where nobody knows.

    Raises:
        UserError: nothing there, no such split, nothing held out.
    """
    folder = resolve(data_dir)
    dummy.ensure(folder)
    data = DataFolder(folder)
    train = str((trained_on or {}).get("hf_split") or "train")
    own = (trained_on or {}).get("hf_validation_split")
    if split not in (None, ALL, HELD_OUT):
        return _named(data, str(split))
    validation = data.held_out_split(train, own, VALIDATION_SPLITS[0], "test")
    if split is None and validation is not None:
        return _named(data, validation)
    known = next((name for name in (train, "train") if data.find(name)), None)
    source = data.open(known or (data.names[0] if data.is_dataset and data.names else train))
    share = float((trained_on or {}).get("train_split") or 1.0)
    return _without_validation(folder, source, split, share, trained_on)


def evaluation_loader(
    images: Images,
    image_size: int,
    num_images: int | None,
    batch_size: int,
    num_workers: int,
    decoder: Decoder,
    max_bad_share: float,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> EvaluationLoader:
    """This rank's share of the first `num_images` centre crops, uint8, in the order of evaluation."""
    rows = images.rows[evaluation_rows(len(images.rows), num_images, world, rank)]
    transform = EvaluationTransform(image_size, decoder)
    workers = WorkerOptions(min(num_workers, len(rows)), device.type == "cuda")
    return EvaluationLoader(
        EvaluationDataset(images.source, rows, transform), batch_size, workers, max_bad_share, persistent=False
    )


def _without_validation(
    folder: Path, source: Source, split: str | None, share: float, trained_on: Mapping[str, Any] | None
) -> Images:
    everything = np.arange(len(source))
    if split == ALL:
        return Images(folder, source, everything, ALL)
    _, held_out = split_rows(len(source), share)
    if split == HELD_OUT and not len(held_out):
        raise UserError(
            f"--split held_out: training held nothing out of {folder} (data.train_split={share:g}). Use --split all, "
            "or a split's name."
        )
    if split is None and (not len(held_out) or _is_other_data(folder, trained_on)):
        if trained_on is not None and folder == resolve(trained_on["data_dir"]):
            log.warning(
                "%s has no validation split and training held nothing out: the score is one of training images.", folder
            )
        return Images(folder, source, everything, ALL)
    log.info(
        "%s has no validation split: the %s of %s images that training held out (data.train_split=%g). --split all "
        "takes all.",
        folder, f"{len(held_out):,}", f"{len(source):,}", share,
    )  # fmt: skip
    return Images(folder, source, held_out, HELD_OUT)


def _is_other_data(folder: Path, trained_on: Mapping[str, Any] | None) -> bool:
    """Whether the training data is here and is not `folder`. If it is not here, `folder` may be a copy of it."""
    if trained_on is None:
        return True
    trained = resolve(trained_on["data_dir"])
    return trained.is_dir() and trained.resolve() != folder.resolve()


def _named(data: DataFolder, split: str) -> Images:
    if data.find(split) is None:
        there = f"it has {', '.join(data.names)}. Use one of these, or" if data.names else "it has none. Use"
        raise UserError(f"{data.folder} has no split {split!r}: {there} --split {ALL} or {HELD_OUT}.")
    source = data.open(split)
    return Images(data.folder, source, np.arange(len(source)), split)
