"""Open the images to reconstruct: files, folders, globs, or a data set."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.core.errors import UserError
from src.core.files import expanded
from src.data.dummy import ensure
from src.data.places import holds_rows
from src.data.sources import SUFFIXES, FileSource, Source, is_image, walk
from src.evaluation.images import ALL, open_images


@dataclass(frozen=True)
class Inputs:
    """The images to reconstruct, in output order."""

    source: Source
    rows: np.ndarray  # (n,) int64
    place: str
    """Description of where they come from."""
    output_name: Callable[[int], str]
    """Row -> path of its output image: unique, relative, without suffix."""


def open_inputs(paths: Sequence[str], split: str | None, limit: int | None = None) -> Inputs:
    """Open any mix of files, folders (searched to any depth) and globs, or one data set on disk. Relative paths start at the
    working directory.

    Args:
        split: of a data set or of a tree with `train` and `val` folders; None: all images.

    Raises:
        UserError: a path that does not exist, or without any images.
    """
    first = expanded(paths[0])
    ensure(first)
    if len(paths) == 1 and first.is_dir() and (split is not None or holds_rows(first)):
        images = open_images(first.absolute(), split or ALL, None)
        return Inputs(images.source, images.rows[:limit], f"{first} ({images.split})", lambda row: f"{row:07d}")
    if split is not None:
        raise UserError("--split is for a single data set; drop it for files, folders and globs.")
    files = list(dict.fromkeys(file for path in paths for file in _expand(path)))[:limit]
    names = _names(files)
    return Inputs(
        _with_labels(files, first if len(paths) == 1 else None),
        np.arange(len(files)),
        " ".join(paths),
        lambda row: names[row],
    )


def _with_labels(files: Sequence[Path], root: Path | None) -> FileSource:
    """Open files. If all are of one folder, its direct subfolders are the classes; files outside them have no label."""
    if root is None or not root.is_dir():
        return FileSource(Path(), [str(file) for file in files])
    parts = [file.relative_to(root).parts for file in files]
    numbers = {name: i for i, name in enumerate(sorted({p[0] for p in parts if len(p) > 1}))}
    labels = [numbers[p[0]] if len(p) > 1 else None for p in parts]
    return FileSource(root, [os.path.join(*p) for p in parts], labels, list(numbers))


def _expand(text: str) -> list[Path]:
    path = expanded(text)
    if path.is_dir():
        found = sorted(path / name for name in walk(path) if is_image(name))
        if not found:
            raise UserError(
                f"No images in {path}: expected files ending in {', '.join(SUFFIXES[:4])} … or a data set on disk."
            )
        return found
    if path.is_file():
        return [path]
    found = sorted(
        Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file() and is_image(name)
    )
    if not found:
        raise UserError(f"--input {text}: no such file or folder, and no image matches it as a pattern.")
    return found


def _names(files: Sequence[Path]) -> list[str]:
    """Return the paths relative to the folder that all files share, with the suffix only where names would clash."""
    absolute = [file.absolute() for file in files]
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    short = [file.relative_to(root).with_suffix("").as_posix() for file in absolute]
    times = Counter(short)
    pairs = zip(short, absolute, strict=True)
    return [file.relative_to(root).as_posix() if times[name] > 1 else name for name, file in pairs]
