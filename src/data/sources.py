"""Rows of encoded images, and the source that reads image files one by one."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from src.core.errors import UserError
from src.data.decode import BadImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
MAX_FILE_BYTES = 1 << 29  # an encoded image of half a GiB is no photograph


class Source(Protocol):
    """Rows of encoded images, the same in every process."""

    @property
    def class_names(self) -> Sequence[str] | None: ...

    @property
    def num_classes(self) -> int | None:
        """Return how many classes the labels count; None where there are no labels."""
        ...

    def __len__(self) -> int: ...

    def encoded(self, index: int) -> bytes | memoryview:
        """Return the row's file as it is stored, undecoded. Raises BadImage where it can't be read."""
        ...

    def label(self, index: int) -> int | None:
        """Return the row's class, 0..num_classes-1; None or -1 where it has none."""
        ...

    def name(self, index: int) -> str:
        """Return the file's name where it is known, for messages."""
        ...

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when rows are added, removed or renamed."""
        ...


class FileSource:
    """Image files, in the order given. files: relative to `root`; labels: by file, or None where there are no classes."""

    def __init__(
        self, root: Path, files: Sequence[str], labels: Sequence[int | None] = (), class_names: Sequence[str] = ()
    ) -> None:
        self.root, self.files, self.labels = root, files, labels
        self.class_names = list(class_names) or None
        self.num_classes = len(class_names) or None

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, index: int) -> bytes:
        return read_file(self.root / self.files[index])

    def label(self, index: int) -> int | None:
        return self.labels[index] if self.labels else None

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(os.fsencode(file) + b"\0" for file in self.files)).hexdigest()[:16]


def read_file(path: str | Path) -> bytes:
    """Read an image file whole. Raises BadImage where that can't be done, is no regular file or too large."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise BadImage(f"a file of {status.st_size:,} bytes")
            return file.read()
    except OSError as error:
        raise BadImage(f"can't be read: {error.strerror or error}") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe that has no writer without waiting for one."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_image_tree(root: Path) -> FileSource:
    """Open the image files below a folder: one folder per class, searched to any depth, or loose files without classes.

    Raises:
        UserError: no file whose name ends like an image's.
    """
    classes = folders(root)
    files, labels = class_files(root, classes, is_image)
    if files:
        return FileSource(root, files, labels, classes)
    if files := [name for name in loose_files(root) if is_image(name) and (root / name).is_file()]:
        return FileSource(root, files)
    raise UserError(
        f"No images in {root} (data.data_dir): expected files ending in {', '.join(SUFFIXES[:4])} … in one "
        "folder per class, or `train` and `val` folders with such classes below. For a Hugging Face dataset "
        "set data.use_hf_dataset=true."
    )


def class_files(
    root: Path, class_names: Sequence[str], wanted: Callable[[str], bool] = lambda name: True, place: str = ""
) -> tuple[list[str], list[int | None]]:
    """List the files (relative to `root`) and labels of the classes that are folders in `root`/`place`."""
    pairs = [(f, i) for i, name in enumerate(class_names) for f in walk(root, os.path.join(place, name)) if wanted(f)]
    return [file for file, _ in pairs], [label for _, label in pairs]


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def walk(root: Path, place: str = "") -> Iterator[str]:
    """Yield the files below `root`/`place`, relative to `root`, in the order of sorted names; hidden ones are left out."""
    for here, below, names in os.walk(root / place, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        relative = os.path.relpath(here, root)
        prefix = "" if relative == "." else relative + os.sep
        yield from (prefix + name for name in sorted(names) if not name.startswith("."))


def folders(path: Path) -> list[str]:
    """Return the names of the folders in `path`, sorted; hidden ones are left out."""
    return [entry.name for entry in _entries(path) if entry.is_dir()]


def loose_files(path: Path) -> list[str]:
    """Return the names of everything in `path` that is no folder, sorted; hidden ones are left out."""
    return [entry.name for entry in _entries(path) if not entry.is_dir()]


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{path} can't be listed: {error.strerror or error}.") from error
