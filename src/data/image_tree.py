"""What a folder of images holds: splits, classes, files. Used by the converter, which tries every file it finds."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from src.core.errors import UserError
from src.data.arrow_writer import UNKNOWN_LABEL
from src.data.sources import FOLDER_NAMES


class File(NamedTuple):
    path: str
    """Relative to the tree's root."""
    label: int


@dataclass(frozen=True)
class Tree:
    root: Path
    splits: dict[str, list[File]]
    has_splits: bool
    """False: classes (or images) directly in the root; the one split is then called `train`."""
    class_names: list[str]
    outside: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of files that belong to no split or class."""

    @property
    def count(self) -> int:
        return sum(map(len, self.splits.values()))


def scan(root: Path) -> Tree:
    """Look through `root`: `train` and `val` (validation, test) folders with classes below, classes at once, or one
    flat folder. Hidden files and folders are passed over. Class numbers follow the sorted names over all splits.

    Raises:
        UserError: no folder, or no file in it.
    """
    if not root.is_dir():
        raise UserError(f"--input_dir {root}: no such folder.")
    folders = _folders(root)
    split_of = {name: split for split, names in FOLDER_NAMES.items() for name in names}
    by_split = {split_of[name]: name for name in folders if name in split_of}
    has_splits = "train" in by_split or (bool(by_split) and len(by_split) == len(folders))
    places = {s: by_split[s] for s in FOLDER_NAMES if s in by_split} if has_splits else {"train": ""}
    class_names = sorted({name for place in places.values() for name in _folders(root / place)})
    splits: dict[str, list[File]] = {}
    outside: list[tuple[str, str]] = []
    for split, place in places.items():
        splits[split], loose = _files(root, place, class_names)
        outside += loose
    if has_splits:
        kept = set(places.values())
        outside += [(n, "a folder beside the splits") for n in folders if n not in kept]
    if not any(splits.values()):
        raise UserError(f"--input_dir {root}: no files in it; expected images in one folder per class.")
    return Tree(root, {s: f for s, f in splits.items() if f}, has_splits, class_names, outside)


def _files(root: Path, place: str, class_names: list[str]) -> tuple[list[File], list[tuple[str, str]]]:
    """The files of one split; without class folders the loose ones are the images."""
    base = root / place
    own = _folders(base)
    loose = [os.path.join(place, n) for n in sorted(os.listdir(base)) if not n.startswith(".") and n not in own]
    if not own:
        return [File(path, UNKNOWN_LABEL) for path in loose], []
    label_of = {name: label for label, name in enumerate(class_names)}
    files: list[File] = []
    for name in own:
        for here, below, names in os.walk(base / name, followlinks=True):
            below[:] = sorted(n for n in below if not n.startswith("."))
            relative = os.path.relpath(here, root)
            files += [File(os.path.join(relative, n), label_of[name]) for n in sorted(names) if not n.startswith(".")]
    return files, [(path, "beside the class folders, so of no class") for path in loose]


def _folders(path: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))
