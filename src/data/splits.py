"""Open the splits of a `data_dir`, and divide its rows into training and held-out ones."""

import logging
from dataclasses import dataclass
from pathlib import Path

from src.core.errors import UserError
from src.data.file_names import TEST_SPLITS, VALIDATION_SPLITS
from src.data.order import Rows, split_rows
from src.data.places import KINDS, look
from src.data.sources import DEFAULT_OPTIONS, ReadOptions, Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """The sources for training and validation, and the rows used from each; `validation` is None if nothing is held out."""

    train: Source
    train_rows: Rows
    validation: Source | None
    validation_rows: Rows
    kind: str
    """Format of the data, as text."""
    description: str
    """One sentence for the log."""

    @property
    def sources(self) -> list[Source]:
        """Return the training source, and the validation source if it is a different one."""
        return [self.train] if self.validation in (None, self.train) else [self.train, self.validation]


def open_evaluation(
    data_dir: Path | str, split: str | None, columns: ReadOptions = DEFAULT_OPTIONS
) -> tuple[Source, str]:
    """Open an evaluation set: the requested split, else the validation or test split, else everything.

    Returns:
        The source, and a sentence that describes it.

    Raises:
        UserError: no such split, or no data.
    """
    data = look(data_dir, columns)
    chosen = split or data.held_out_split("train", VALIDATION_SPLITS[0], TEST_SPLITS[0])
    source = data.open(chosen) if chosen is not None else data.open_all()
    return source, f"{len(source):,} images of {data_dir}" + (f", split {chosen!r}" if chosen else "")


def open_splits(
    data_dir: Path | str,
    use_hf_dataset: bool | None,
    hf_split: str,
    hf_validation_split: str | None,
    train_split: float,
    columns: ReadOptions = DEFAULT_OPTIONS,
) -> Splits:
    """Open the data of a run.

    Training uses the share `train_split` of the training split. Evaluation uses the whole validation split if it exists,
    else the rest of the training split.

    Raises:
        UserError: no data, or nothing left to train on.
    """
    data = look(data_dir, columns, latents=True)
    kind = KINDS[data.kind]
    if use_hf_dataset not in (None, data.kind in ("dataset", "cache", "arrow")):
        log.warning(
            "data.use_hf_dataset=%s does not match %s, which is read as %s. Set it to null to detect the format.",
            str(use_hf_dataset).lower(), data_dir, kind,
        )  # fmt: skip
    train = data.open(hf_split)
    rows, held_out = split_rows(len(train), train_split)
    if not len(rows):
        raise UserError(f"data.train_split={train_split} leaves none of the {len(train)} images for training.")
    validation_split = data.held_out_split(hf_split, hf_validation_split)
    if validation_split is not None:
        validation = data.open(validation_split)
        text = f"{len(rows)} of {len(train)} images of {hf_split!r} for training, {len(validation)} of {validation_split!r} for"
        return Splits(train, rows, validation, range(len(validation)), kind, f"{data_dir}: {text} evaluation")
    text = f"{data_dir}: no split {hf_validation_split!r}; {len(rows)} of {len(train)} images for training"
    if not len(held_out):
        return Splits(train, rows, None, held_out, kind, f"{text}, none held out (data.train_split={train_split:g})")
    return Splits(train, rows, train, held_out, kind, f"{text}, {len(held_out)} held out for evaluation")
