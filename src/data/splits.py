"""What lies at a `data_dir`, its splits, and which rows are for training and which are held out.

Training, evaluation and the converter know splits by the same names.
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.core.errors import UserError
from src.core.json_files import read_json
from src.data.arrow import ArrowSource, Columns
from src.data.order import split_rows
from src.data.sources import Source, folders, is_image, loose_files, open_image_tree, walk

TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("validation", "val", "valid", "dev")
TEST_SPLITS = ("test",)
SPLIT_NAMES = (TRAIN_SPLITS, VALIDATION_SPLITS, TEST_SPLITS)
"""Names that mean the same split; the first is the one that the converter writes."""

# One of these lies in every Hugging Face dataset on disk.
MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")
CONVERT = "python scripts/create_hf_test_data.py --input_dir"


class DataFolder:
    """A folder of data: a Hugging Face dataset on disk, one with splits, or a tree of image files.

    use_hf_dataset: what it is taken for; None: decided by its content.

    Raises:
        UserError: not there, or no dataset where one is expected.
    """

    def __init__(self, folder: Path, use_hf_dataset: bool | None = None) -> None:
        _require_folder(folder)
        self.folder = folder
        self.is_dataset = is_dataset(folder) if use_hf_dataset is None else use_hf_dataset
        self.names = _dataset_splits(folder) if self.is_dataset else folders(folder)
        """Splits of a dataset, empty where it has none; of an image tree, its folders, which may be classes."""

    def find(self, split: str) -> str | None:
        """Return the name that `split` has here, among all that mean the same; None where there is none of them."""
        same = next((names for names in SPLIT_NAMES if split in names), ())
        return next((name for name in (split, *same) if name in self.names), None)

    def held_out_split(self, train: str, *wanted: str | None) -> str | None:
        """Return the first of `wanted` that is a split other than the one to train on.

        In an image tree there must be one to train on: without it, `val` may be a class like any other.
        """
        own = self.find(train) or self.find("train")
        if own is None and not self.is_dataset:
            return None
        return next((name for name in wanted if name and self.find(name) not in (None, own)), None)

    def open(self, split: str, label: str | None = None) -> Source:
        """Open a split. Without splits, everything is what is asked for; of an image tree, only the training split.

        Raises:
            UserError: no such split, or a dataset that is damaged or holds no images.
        """
        found = self.find(split)
        if found is not None:
            return self._source(self.folder / found, label)
        others = self.names if self.is_dataset else [n for n in self.names if any(n in same for same in SPLIT_NAMES)]
        if others and (self.is_dataset or split not in TRAIN_SPLITS):
            raise UserError(
                f"{self.folder} has no split {split!r} (data.hf_split); it has {', '.join(others)}. "
                f"Set data.hf_split={others[0]}."
            )
        return self._source(self.folder, label)

    def _source(self, folder: Path, label: str | None) -> Source:
        if self.is_dataset:
            return ArrowSource(folder, Columns(label=label))
        if label is not None:
            raise UserError(
                f"data.label={label}: {folder} holds image files, whose labels are their folders. Set data.label=null."
            )
        return open_image_tree(folder)


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
    data_dir: Path,
    use_hf_dataset: bool,
    hf_split: str,
    hf_validation_split: str | None,
    train_split: float,
    label: str | None = None,
) -> Splits:
    """Open the data of a run.

    Where the validation split exists, training takes `train_split` of the training split and evaluation all of the
    validation split. Where it does not, `train_split` of the training split is for training and the rest is held out.

    Raises:
        UserError: nothing there, or nothing left to train on.
    """
    if not 0 < train_split <= 1:
        raise UserError(f"data.train_split={train_split}: expected a share above 0 and up to 1.")
    data = DataFolder(data_dir, use_hf_dataset)
    train = data.open(hf_split, label)
    rows, held_out = split_rows(len(train), train_split)
    if not len(rows):
        raise UserError(f"data.train_split={train_split} leaves none of the {len(train)} images for training.")
    validation_split = data.held_out_split(hf_split, hf_validation_split)
    if validation_split is not None:
        validation = data.open(validation_split, label)
        text = f"{len(rows)} of {len(train)} images of {hf_split!r} for training, {len(validation)} of "
        text = f"{data_dir}: {text}{validation_split!r} for evaluation"
        return Splits(train, rows, validation, np.arange(len(validation)), text)
    text = f"{data_dir}: no split {hf_validation_split!r}; {len(rows)} of {len(train)} images for training"
    if not len(held_out):
        return Splits(train, rows, None, held_out, f"{text}, none held out (data.train_split={train_split:g})")
    return Splits(train, rows, train, held_out, f"{text}, {len(held_out)} held out for evaluation")


def is_dataset(folder: Path) -> bool:
    """Return whether the folder holds a Hugging Face dataset on disk, complete or not."""
    return any((folder / mark).is_file() for mark in MARKS) or any(folder.glob("*.arrow"))


def _dataset_splits(folder: Path) -> list[str]:
    if (folder / "dataset_dict.json").is_file():
        return [str(name) for name in read_json(folder / "dataset_dict.json").get("splits", [])]
    if not any((folder / mark).is_file() for mark in MARKS):
        raise UserError(f"{folder} (data.data_dir) {_instead_of_a_dataset(folder)}")
    return []


def _require_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{folder} (data.data_dir) is a file; expected the folder of a dataset.")
    parent = next(p for p in folder.parents if p.is_dir())
    there = folders(parent) if os.access(parent, os.R_OK) else []
    close = difflib.get_close_matches(folder.relative_to(parent).parts[0], there, n=5, cutoff=0.4) or there[:5]
    raise UserError(
        f"No dataset at {folder} (data.data_dir).{f' Folders in {parent}: ' + ', '.join(close) + '.' if close else ''} "
        f"Set data.data_dir, or make the dataset from a folder of images with `{CONVERT} IMAGES --output_dir {folder}`."
    )


def _instead_of_a_dataset(folder: Path) -> str:
    """Say what is there, and what to do with it. Nothing at `folder` is overwritten: it may be the only copy."""
    beside = f"{folder}_hf"
    if arrow := list(folder.glob("*.arrow")):
        return (
            f"holds {len(arrow)} Arrow files but no dataset_info.json and state.json: it was half-written or "
            f"half-copied. Copy it again, or move it away and convert again with `{CONVERT} IMAGES --output_dir {folder}`."
        )
    if below := [name for name in folders(folder) if (folder / name / "dataset_info.json").is_file()]:
        return (
            f"is no dataset itself, but these folders in it are: {', '.join(below[:8])}. "
            f"Set data.data_dir={folder / below[0]}."
        )
    if not folders(folder) and not loose_files(folder):
        return f"is empty: no Hugging Face dataset. Make one with `{CONVERT} IMAGES --output_dir {folder}`."
    # The first file of either kind decides: a look through all of ImageNet would take minutes.
    first = next((file for file in walk(folder) if is_image(file) or file.endswith(".parquet")), "")
    if first.endswith(".parquet"):
        route = f"import datasets; datasets.load_dataset({str(folder)!r}).save_to_disk({beside!r})"
        return (
            "holds Parquet files, not a Hugging Face dataset on disk. Make one beside it "
            f'with `python -c "{route}"` and set data.data_dir={beside}.'
        )
    if first:
        return (
            f"holds image files, not a Hugging Face dataset. Convert it with `{CONVERT} {folder} --output_dir {beside}`, "
            "or read the files as they are with data.use_hf_dataset=false."
        )
    return (
        f"holds none of {', '.join(MARKS)}: no Hugging Face dataset. Make one beside it with "
        f"`{CONVERT} IMAGES --output_dir {beside}` and set data.data_dir={beside}."
    )
