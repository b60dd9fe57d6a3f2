"""Open the images of an evaluation, whatever the kind of data set.

They are prepared as the options ask, else as in the checkpoint's training (whose callback then gives the same score);
without a checkpoint, by the project's defaults.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from src.core.distributed import Process
from src.core.errors import UserError
from src.core.options import DataOptions, LoadingOptions
from src.data import dummy
from src.data.dataset import EvaluationDataset, EvaluationTransform
from src.data.decode import Decoder, Exif
from src.data.file_names import TEST_SPLITS, VALIDATION_SPLITS
from src.data.loader import EvaluationLoader, WorkerOptions
from src.data.order import evaluation_rows, split_rows
from src.data.places import Place, locate, look
from src.data.settings import first_source
from src.data.sources import Source
from src.formats.checkpoint import stored
from src.metrics.reference import Preparation

log = logging.getLogger(__name__)

T = TypeVar("T")

ALL, HELD_OUT = "all", "held_out"
MAX_MEGAPIXELS = 80.0


@dataclass(frozen=True)
class Images:
    """The rows of a source to evaluate."""

    folder: Path | str
    source: Source
    rows: np.ndarray  # (n,) int64
    split: str
    """Name of the split, `held_out` or `all`."""

    def description(self) -> dict[str, Any]:
        return {
            "data_dir": str(self.folder),
            "split": self.split,
            "available": len(self.rows),
            "fingerprint": self.source.fingerprint(),
        }

    def preparation(self, image_size: int, exif: str, num_images: int | None) -> Preparation:
        """Return how these images are prepared, as a reference stores it and is checked against."""
        available = len(self.rows)
        selected = min(available, num_images or available)
        return Preparation(image_size, exif, self.split, self.source.fingerprint(), available, selected)


def open_images(data_dir: str | Path, split: str | None, trained_on: Mapping[str, Any] | None) -> Images:
    """Open the images to evaluate.

    Args:
        split: a name, `held_out`, `all`, or None: the validation split, else what training held out, else a test split,
            else all.
        trained_on: the `data` config of the run that trained the model; None if unknown.

    Raises:
        UserError: no data, an unknown split, or nothing held out.
    """
    folder = locate(data_dir)
    trained_on = first_source(trained_on) if trained_on is not None else None
    if isinstance(folder, Path):
        dummy.ensure(folder)
    data, training = look(folder), trained_on or {}
    train = str(training.get("hf_split") or "train")
    if split not in (None, ALL, HELD_OUT):
        return _named(folder, data, str(split))
    other = split is None and (trained_on is None or _is_other_data(folder, trained_on))
    wanted = VALIDATION_SPLITS[0], *(TEST_SPLITS if other else ())
    validation = data.held_out_split(train, training.get("hf_validation_split"), *wanted)
    if split is None and validation is not None:
        return _named(folder, data, str(data.find(validation)))
    source = data.open_all(train)
    everything = Images(folder, source, np.arange(len(source)), ALL)
    if split == ALL:
        return everything
    share = float(training.get("train_split") or 1.0)
    _, held_out = split_rows(len(source), share)
    if split == HELD_OUT and not len(held_out):
        raise UserError(
            f"--split held_out: training held nothing out of {folder} (data.train_split={share:g}). Use --split all, "
            "or a split's name."
        )
    if split is None and (other or not len(held_out)):
        if test := data.held_out_split(train, *TEST_SPLITS):
            return _named(folder, data, test)
        if trained_on is not None and folder == locate(trained_on["data_dir"]):
            log.warning("%s has no validation split and training held nothing out: training images are scored.", folder)
        return everything
    log.info(
        "%s has no validation split: using the %s of %s images that training held out (data.train_split=%g). --split all "
        "uses all.",
        folder, f"{len(held_out):,}", f"{len(source):,}", share,
    )  # fmt: skip
    return Images(folder, source, held_out, HELD_OUT)


def centre_crops(
    images: Images, image_size: int, decoder: Decoder, options: LoadingOptions, process: Process
) -> EvaluationLoader:
    """Return a loader for this rank's share of the first --num_samples images in evaluation order."""
    rows = images.rows[evaluation_rows(len(images.rows), options.num_samples, process.world, process.rank)]
    return evaluation_loader(images.source, rows, EvaluationTransform(image_size, decoder), options, process)


def evaluation_loader(
    source: Source, rows: np.ndarray, transform: Callable[[Any], np.ndarray], options: LoadingOptions, process: Process
) -> EvaluationLoader:
    """Return a loader of rows, in order; `transform` turns the bytes of a file into uint8 S x S x 3."""
    workers = WorkerOptions(min(options.num_workers, len(rows)), process.device.type == "cuda")
    dataset = EvaluationDataset(source, rows, transform)  # type: ignore[arg-type]
    return EvaluationLoader(dataset, options.batch_size, workers, options.max_bad_share, persistent=False)


def choose(option: str, given: T | None, config: Mapping[str, Any], key: str, default: T) -> T:
    """Return the option, else the run's own value, else the default, and log which."""
    trained = stored(config, key)
    if given is None:
        value, source = (default, "by default") if trained is None else (trained, f"as in training, {key}")
    elif trained not in (None, given):
        value, source = given, f"as given; the training of this checkpoint used {key}={trained}, its scores differ"
    else:
        value, source = given, "as given"
    log.info("--%s %s (%s)", option, value, source)
    return value


def decoder_of(options: DataOptions, config: Mapping[str, Any]) -> Decoder:
    """Return the decoder of image files."""
    exif: Exif = choose("exif", options.exif, config, "data.exif", "apply")
    return Decoder(exif, stored(config, "data.max_megapixels") or MAX_MEGAPIXELS)


def _is_other_data(folder: Path | str, trained_on: Mapping[str, Any]) -> bool:
    """Return whether the training data exists and is not `folder`. If it is missing, `folder` may be a copy of it."""
    trained = locate(trained_on["data_dir"])
    if isinstance(trained, str) or isinstance(folder, str):
        return trained != folder
    return trained.is_dir() and trained.resolve() != folder.resolve()


def _named(folder: Path | str, data: Place, split: str) -> Images:
    if data.find(split) is None:
        names = data.names if len(data.names) < 9 else [*data.names[:8], "…"]  # possibly classes
        there = f"it has {', '.join(names)}. Use one of these, or" if names else "it has none. Use"
        raise UserError(f"{folder} has no split {split!r}: {there} --split {ALL} or {HELD_OUT}.")
    source = data.open(split)
    return Images(folder, source, np.arange(len(source)), split)
