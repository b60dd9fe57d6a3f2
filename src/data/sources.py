"""Where encoded images come from: a Hugging Face dataset on disk, one with splits, or a tree of image files.

A row is handed out as the bytes of its file, undecoded. Arrow files are memory-mapped and read without a copy, and
without the `datasets` library, whose import takes longer than opening ImageNet.
"""

import difflib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from src.core.errors import UserError
from src.data.arrow import ArrowSource, read_json
from src.data.decode import BadImage

# One of these lies in every Hugging Face dataset on disk.
MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")
CONVERT = "python scripts/create_hf_test_data.py --input_dir IMAGES --output_dir"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
# Folder names that mean a split in an image tree, by the name of the split they stand for.
FOLDER_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test",)}


class Source(Protocol):
    """Rows of encoded images, the same in every process."""

    @property
    def class_names(self) -> Sequence[str] | None: ...

    def __len__(self) -> int: ...

    def encoded(self, index: int) -> bytes | memoryview:
        """The row's file as it lies on the disk. Raises BadImage where it can't be read."""
        ...

    def label(self, index: int) -> int | None: ...

    def name(self, index: int) -> str:
        """For messages: the file's name where it is known."""
        ...

    def fingerprint(self) -> str:
        """16 hex digits; another one when rows were added, removed or renamed."""
        ...


class FolderSource:
    """Image files below a folder: one folder per class (searched to any depth), or no classes at all.

    Only names ending like an image count, hidden ones don't; the order is that of the sorted names.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        classes = sorted(e.name for e in _entries(root) if e.is_dir() and not e.name.startswith("."))
        self._files: list[str] = []
        self._labels: list[int | None] = []
        for label, name in enumerate(classes):
            files = image_files(root / name, root)
            self._files += files
            self._labels += [label] * len(files)
        self.class_names: list[str] | None = classes if self._files else None
        if not self._files:
            self._files = sorted(e.name for e in _entries(root) if e.is_file() and is_image(e.name))
            self._labels = [None] * len(self._files)
        if not self._files:
            raise UserError(
                f"No images in {root} (data.data_dir): expected files ending in {', '.join(SUFFIXES[:4])} … in one "
                "folder per class, or `train` and `val` folders with such classes below. For a Hugging Face dataset "
                "set data.use_hf_dataset=true."
            )

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, index: int) -> bytes:
        try:
            return (self.root / self._files[index]).read_bytes()
        except OSError as error:
            raise BadImage(f"can't be read: {error.strerror or error}") from error

    def label(self, index: int) -> int | None:
        return self._labels[index]

    def name(self, index: int) -> str:
        return str(self.root / self._files[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self._files:
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()[:16]


def open_hf(data_dir: Path, split: str) -> ArrowSource:
    """A split of a Hugging Face dataset on disk.

    Raises:
        UserError: not there, half-written, cut short, without that split or without an image column.
    """
    splits = hf_splits(data_dir)
    if splits is None:
        return ArrowSource(data_dir)
    if split not in splits:
        raise UserError(
            f"{data_dir} has no split {split!r} (data.hf_split); it has {', '.join(splits)}. "
            f"Set data.hf_split={splits[0] if splits else '…'}."
        )
    return ArrowSource(data_dir / split)


def hf_splits(data_dir: Path) -> list[str] | None:
    """The names of the splits; None for a single dataset, which is taken as whatever split is asked for."""
    _require_folder(data_dir)
    index = data_dir / "dataset_dict.json"
    if index.is_file():
        return [str(name) for name in read_json(index).get("splits", [])]
    if (data_dir / "dataset_info.json").is_file() or (data_dir / "state.json").is_file():
        return None
    raise UserError(_not_a_dataset(data_dir))


def open_folder(data_dir: Path, split: str) -> FolderSource:
    """A split of an image tree: the folder named like the split, or, for the training split, the tree itself."""
    folder = find_folder(data_dir, split)
    if folder is not None:
        return FolderSource(folder)
    names = [e.name for e in _entries(data_dir) if e.is_dir()]
    known = [n for n in sorted(names) if any(n in aliases for aliases in FOLDER_NAMES.values())]
    if known and split not in FOLDER_NAMES["train"]:
        raise UserError(f"{data_dir} has no folder for the split {split!r}; it has {', '.join(known)}.")
    return FolderSource(data_dir)


def find_folder(data_dir: Path, split: str) -> Path | None:
    """The folder of `split` below `data_dir`, under any of its usual names; None where there is none."""
    _require_folder(data_dir)
    aliases = next((a for a in FOLDER_NAMES.values() if split in a), ())
    for name in dict.fromkeys((split, *aliases)):
        if (data_dir / name).is_dir():
            return data_dir / name
    return None


def split_names(data_dir: Path, use_hf_dataset: bool, train: str, validation: str | None) -> list[str]:
    """The splits that are there, those to train on first in an image tree; empty where the set has none.

    Folders of an image tree are splits beside one to train on, `train` or the usual one: without it, `val` may be a
    class like any other.
    """
    if use_hf_dataset:
        return hf_splits(data_dir) or []
    if find_folder(data_dir, train) is None and find_folder(data_dir, "train") is None:
        return []
    found: dict[Path, str] = {}
    for name in (train, "train", validation, "validation", "test"):
        folder = find_folder(data_dir, name) if name else None
        if name and folder is not None:
            found.setdefault(folder, name)
    return list(found.values())


def _require_folder(data_dir: Path) -> None:
    if data_dir.is_dir():
        return
    if data_dir.exists():
        raise UserError(f"{data_dir} (data.data_dir) is a file; expected the folder of a dataset.")
    parent = next(p for p in data_dir.parents if p.is_dir())
    folders = (
        sorted(e.name for e in os.scandir(parent) if e.is_dir() and not e.name.startswith("."))
        if os.access(parent, os.R_OK)
        else []
    )
    missing = data_dir.relative_to(parent).parts[0]
    close = difflib.get_close_matches(missing, folders, n=5, cutoff=0.4) or folders[:5]
    there = f" Folders in {parent}: {', '.join(close)}." if close else ""
    raise UserError(
        f"No dataset at {data_dir} (data.data_dir).{there} Set data.data_dir, or make the dataset from a folder of "
        f"images with `{CONVERT} {data_dir}`."
    )


def _not_a_dataset(data_dir: Path) -> str:
    entries = list(_entries(data_dir))
    beside = f"{data_dir}_hf"
    arrow = [e.name for e in entries if e.name.endswith(".arrow")]
    if arrow:
        return (
            f"{data_dir} holds {len(arrow)} Arrow files but no dataset_info.json and state.json: it was half-written "
            f"or half-copied. Copy it again, or move it away and convert again with `{CONVERT} {data_dir}`."
        )
    below = sorted(e.name for e in entries if e.is_dir() and (Path(e.path) / "dataset_info.json").is_file())
    if below:
        return (
            f"{data_dir} is no dataset itself, but these folders in it are: {', '.join(below[:8])}. "
            f"Set data.data_dir={data_dir / below[0]}."
        )
    if not entries:
        return f"{data_dir} (data.data_dir) is empty: no Hugging Face dataset. Make one with `{CONVERT} {data_dir}`."
    kind = _kind_of_files(data_dir)
    if kind == "image":
        return (
            f"{data_dir} (data.data_dir) holds image files, not a Hugging Face dataset. Convert it with "
            f"`python scripts/create_hf_test_data.py --input_dir {data_dir} --output_dir {beside}`, or read the "
            "files as they are with data.use_hf_dataset=false."
        )
    if kind == "Parquet":
        route = f"import datasets; datasets.load_dataset({str(data_dir)!r}).save_to_disk({beside!r})"
        return (
            f"{data_dir} (data.data_dir) holds Parquet files, not a Hugging Face dataset on disk. Make one beside it "
            f'with `python -c "{route}"` and set data.data_dir={beside}.'
        )
    return (
        f"{data_dir} (data.data_dir) holds none of {', '.join(MARKS)}: no Hugging Face dataset. Make one beside it with "
        f"`{CONVERT} {beside}` and set data.data_dir={beside}."
    )


def _entries(folder: Path) -> list[Any]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{folder} can't be listed: {error.strerror or error}.") from error


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image; hidden files are none."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def image_files(folder: Path, root: Path) -> list[str]:
    """Return the images below `folder` at any depth, relative to `root`; hidden folders are left out."""
    found: list[str] = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.relpath(os.path.join(here, name), root) for name in sorted(files) if is_image(name)]
    return found


def _kind_of_files(root: Path) -> str | None:
    """`image` or `Parquet`, by the first folder that has either: a look through all of ImageNet would take minutes."""
    for _, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(name.endswith(".parquet") for name in files):
            return "Parquet"
        if any(is_image(name) for name in files):
            return "image"
    return None
