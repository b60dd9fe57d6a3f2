"""The splits of a `data_dir`, and which rows are for training and which are held out."""

import logging
from dataclasses import dataclass
from pathlib import Path

from src.core.errors import UserError
from src.data.order import AllRows, Rows, split_rows
from src.data.places import KINDS, look
from src.data.read_options import DEFAULT_OPTIONS, ReadOptions
from src.data.sources import Source
from src.data.split_names import ALIASES, SPLIT_NAMES, TEST_SPLITS, TRAIN_SPLITS, VALIDATION_SPLITS

__all__ = ["VALIDATION_SPLITS", "DataFolder", "Splits", "open_splits"]
log = logging.getLogger(__name__)


class DataFolder:
    """The data at a place, with its splits.

    use_hf_dataset: what the user takes it for; its content decides, and where they differ a warning says so.
    latents: whether stored latents will do.

    Raises:
        UserError: nothing there that can be read.
    """

    def __init__(
        self,
        folder: Path | str,
        use_hf_dataset: bool | None = None,
        columns: ReadOptions = DEFAULT_OPTIONS,
        latents: bool = False,
    ) -> None:
        self.folder, self._columns = folder, columns
        self.place = look(folder, columns)
        kind = self.place.kind
        if kind == "latents" and not latents:
            raise UserError(
                f"{folder} holds stored latents, and images are needed here: only stage 2 trains on latents (data.data_dir)."
            )
        is_arrow = kind in ("dataset", "cache", "arrow")
        if (use_hf_dataset is True and not is_arrow) or (use_hf_dataset is False and is_arrow):
            log.warning(
                "data.use_hf_dataset=%s, but %s is a %s and is read as that. null leaves it to the content.",
                str(use_hf_dataset).lower(), folder, KINDS[kind],
            )  # fmt: skip
        self.is_dataset = kind != "tree"
        """Whether `names` are splits; of an image tree, they may be classes."""
        self.names = [] if kind in ("arrow", "list", "latents") else list(self.place.splits)

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

    def open(self, split: str) -> Source:
        """Open a split. Without splits, everything is what is asked for; of an image tree, only the training split.

        Raises:
            UserError: no such split, or data that is damaged or holds no images.
        """
        found = self.find(split)
        if found is not None:
            return self.place.open(found, self._columns)
        others = self.names if self.is_dataset else [n for n in self.names if n in ALIASES]
        only_splits = len(others) == len(self.names)
        if others and (only_splits or split not in TRAIN_SPLITS):
            raise UserError(
                f"{self.folder} has no split {split!r} (data.hf_split); it has {', '.join(others)}. "
                f"Set data.hf_split={others[0]}."
            )
        return self.place.open(None, self._columns)


@dataclass(frozen=True)
class Splits:
    """Sources and the rows of them that each part uses; `validation` is None where nothing is held out."""

    train: Source
    train_rows: Rows
    validation: Source | None
    validation_rows: Rows
    kind: str
    """What was opened, in words."""
    description: str
    """One sentence for the log."""


def open_evaluation(
    data_dir: Path | str, split: str | None, columns: ReadOptions = DEFAULT_OPTIONS
) -> tuple[Source, str]:
    """Open an evaluation set: the split asked for, else the validation or test split, else everything.

    Returns:
        The source, and a sentence about it.

    Raises:
        UserError: no such split, or nothing there.
    """
    data = DataFolder(data_dir, None, columns)
    chosen = split or next((name for name in (*VALIDATION_SPLITS, *TEST_SPLITS) if data.find(name)), None)
    source = data.open(chosen) if chosen is not None else data.place.open(None, columns)
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

    Where the validation split exists, training takes `train_split` of the training split and evaluation all of the
    validation split. Where it does not, `train_split` of the training split is for training and the rest is held out.

    Raises:
        UserError: nothing there, or nothing left to train on.
    """
    if not 0 < train_split <= 1:
        raise UserError(f"data.train_split={train_split}: expected a share above 0 and up to 1.")
    data = DataFolder(data_dir, use_hf_dataset, columns, latents=True)
    kind = KINDS[data.place.kind]
    train = data.open(hf_split)
    rows, held_out = split_rows(len(train), train_split)
    if not len(rows):
        raise UserError(f"data.train_split={train_split} leaves none of the {len(train)} images for training.")
    validation_split = data.held_out_split(hf_split, hf_validation_split)
    if validation_split is not None:
        validation = data.open(validation_split)
        text = f"{len(rows)} of {len(train)} images of {hf_split!r} for training, {len(validation)} of "
        text = f"{data_dir}: {text}{validation_split!r} for evaluation"
        return Splits(train, rows, validation, AllRows(len(validation)), kind, text)
    text = f"{data_dir}: no split {hf_validation_split!r}; {len(rows)} of {len(train)} images for training"
    if not len(held_out):
        return Splits(train, rows, None, held_out, kind, f"{text}, none held out (data.train_split={train_split:g})")
    return Splits(train, rows, train, held_out, kind, f"{text}, {len(held_out)} held out for evaluation")
