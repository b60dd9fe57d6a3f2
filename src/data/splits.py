"""Which rows are for training and which are held out: the two modes of the user guide (chapter 数据准备)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.core.errors import UserError
from src.data import sources
from src.data.order import split_rows
from src.data.sources import Source

VALIDATION_SPLITS = sources.FOLDER_NAMES["validation"]
"""Names of a validation split, in a Hugging Face dataset as in an image tree."""


@dataclass(frozen=True)
class Splits:
    """Sources and the rows of them that each part uses; `validation` is None where nothing is held out."""

    train: Source
    train_rows: np.ndarray
    validation: Source | None
    validation_rows: np.ndarray
    description: str
    """One sentence for the log."""


def open_splits(
    data_dir: Path, use_hf_dataset: bool, hf_split: str, hf_validation_split: str | None, train_split: float
) -> Splits:
    """Open what is for training and what is held out.

    Mode 1: a validation split exists (see `validation_split`); training takes `train_split` of the training split,
    evaluation all of it. Mode 2: it does not; `train_split` of the training split is for training and the rest is held
    out. With use_hf_dataset false the splits are the folders of an image tree that are called so.

    Raises:
        UserError: nothing there, or nothing left to train on.
    """
    if not 0 < train_split <= 1:
        raise UserError(f"data.train_split={train_split}: expected a share above 0 and up to 1.")
    train = open_split(data_dir, use_hf_dataset, hf_split)
    rows, held_out = split_rows(len(train), train_split)
    if not len(rows):
        raise UserError(f"data.train_split={train_split} leaves none of the {len(train)} images for training.")
    names = sources.split_names(data_dir, use_hf_dataset, hf_split, hf_validation_split)
    name = validation_split(names, hf_validation_split, hf_split)
    if name is not None:
        validation = open_split(data_dir, use_hf_dataset, name)
        text = f"{len(rows)} of {len(train)} images of {hf_split!r} for training, {len(validation)} of "
        text = f"{data_dir}: {text}{name!r} for evaluation"
        return Splits(train, rows, validation, np.arange(len(validation)), text)
    text = f"{data_dir}: no split {hf_validation_split!r}; {len(rows)} of {len(train)} images for training"
    if not len(held_out):
        return Splits(train, rows, None, held_out, f"{text}, none held out (data.train_split={train_split:g})")
    return Splits(train, rows, train, held_out, f"{text}, {len(held_out)} held out for evaluation")


def validation_split(names: Sequence[str], wanted: str | None, train: str) -> str | None:
    """Return which of a data set's splits (`names`) is evaluated: `wanted`, else another usual name of a validation split.

    None where there is none, and where none is `wanted`. What is trained on, `train`, does not stand in for it.
    """
    if wanted is None:
        return None
    usual = (name for name in VALIDATION_SPLITS if name != train)
    return next((name for name in (wanted, *usual) if name in names), None)


def open_split(data_dir: Path, use_hf_dataset: bool, split: str) -> Source:
    """Open one split. UserError where there is none of that name."""
    return sources.open_hf(data_dir, split) if use_hf_dataset else sources.open_folder(data_dir, split)
