"""Define the interface of image sources, and read folders of image files."""

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from src.core.errors import UserError
from src.data.decode import BadImage

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
MAX_FILE_BYTES = 1 << 29  # 512 MiB, far above any photograph


@dataclass(frozen=True)
class ReadOptions:
    """How to read a dataset of any format: column names, and options of object storage.

    image: None: the column called `image`, else the only one of type Image. label: None: the column called `label`, if it
    holds integers; of tars `cls` or `json:KEY`. storage: for fsspec; may contain secrets, so it is never shown.
    cache_gb: local disk cache for rows from object storage; 0: none.
    """

    image: str | None = None
    label: str | None = None
    storage: Mapping[str, Any] | None = field(default=None, repr=False)
    cache_gb: float = 0.0


DEFAULT_OPTIONS = ReadOptions()


class Source(Protocol):
    """Rows of encoded images, identical in every process."""

    class_names: Sequence[str] | None
    num_classes: int | None
    """Number of classes; None if there are no labels."""

    def __len__(self) -> int: ...

    def encoded(self, index: int) -> bytes | memoryview:
        """Return the row's encoded image as stored. Raises BadImage if it can't be read."""

    def label(self, index: int) -> int | None:
        """Return the row's class, 0..num_classes-1; None or -1 if it has none."""

    def name(self, index: int) -> str:
        """Return the row's file name if known, for messages."""

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when rows are added, removed or renamed."""


class FileSource:
    """Image files, in the given order. files: relative to `root`; labels: one per file, None: no class; empty: no labels."""

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        labels: Sequence[int | None] = (),
        class_names: Sequence[str] = (),
        num_classes: int | None = None,
    ) -> None:
        """num_classes: None: the number of class names."""
        encoded = [file.encode("utf-8", "surrogatepass") for file in files]
        # One buffer: with a list, reference counting would make forked workers copy its pages one by one.
        self._text, self._starts = b"".join(encoded), np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._labels = np.array([-1 if label is None else label for label in labels], np.int64)
        self.root = root
        self.class_names: Sequence[str] | None = list(class_names) or None
        self.num_classes = num_classes or len(class_names) or None

    def __len__(self) -> int:
        return len(self._starts) - 1

    def encoded(self, index: int) -> bytes:
        return read_file(self.root / self.member(index))

    def label(self, index: int) -> int | None:
        return int(self._labels[index]) if len(self._labels) else None

    def name(self, index: int) -> str:
        return str(self.root / self.member(index))

    def member(self, index: int) -> str:
        """Return the file's name, relative to the root."""
        start, stop = self._starts[index : index + 2]
        return self._text[start:stop].decode("utf-8", "surrogatepass")

    @property
    def names(self) -> Iterator[str]:
        return map(self.member, range(len(self)))

    def fingerprint(self) -> str:
        return short_digest(b"".join(os.fsencode(name) + b"\0" for name in self.names))

    def cut(self, start: int, stop: int) -> "FileSource":
        """Return a source of the rows from `start` to `stop`."""
        names = [self.member(i) for i in range(start, stop)]
        return FileSource(self.root, names, self._labels[start:stop].tolist(), self.class_names or ())


def short_digest(data: bytes) -> str:
    """Return 16 hex digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def read_file(path: str | Path) -> bytes:
    """Read an image file. Raises BadImage if it can't be read, is not a regular file or is too large."""
    try:
        never_wait = getattr(os, "O_NONBLOCK", 0)  # for the writer of a named pipe
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | never_wait)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise BadImage(f"a file of {status.st_size:,} bytes")
            return file.read()
    except OSError as error:
        raise BadImage(f"can't be read: {error.strerror or error}") from error


def open_image_tree(root: Path) -> FileSource:
    """Open the image files below a folder: one folder per class, searched to any depth, or loose files without classes.

    Raises:
        UserError: no file with the suffix of an image.
    """
    classes = folders(root)
    files, labels = class_files(root, classes, is_image)
    loose = [name for name in loose_files(root) if is_image(name) and (root / name).is_file()]
    if files and loose:
        outside = "%s: %d images outside its class folders are left out: %s. Move them into a class folder."
        log.warning(outside, root, len(loose), ", ".join(map(printable, loose[:4])))
    if files:
        return FileSource(root, files, labels, classes)
    if loose:
        return FileSource(root, loose)
    raise UserError(
        f"No images in {root} (data.data_dir): expected files ending in {', '.join(SUFFIXES[:4])} … in one "
        "folder per class, or `train` and `val` folders with such classes below."
    )


def class_files(
    root: Path, class_names: Sequence[str], wanted: Callable[[str], bool] | None = None, place: str = ""
) -> tuple[list[str], list[int | None]]:
    """List the files (relative to `root`) and labels of the class folders in `root`/`place`.

    wanted: selects file names; None: all, including those of non-regular files.
    """
    files: list[str] = []
    labels: list[int | None] = []
    here = (root / place).resolve()
    seen = {_identity(folder) for folder in (here, *here.parents)}  # a link to one of these would add other splits
    for i, name in enumerate(class_names):
        for file in walk(root, os.path.join(place, name), seen, every=wanted is None):
            if wanted is None or wanted(file):
                files.append(file)
                labels.append(i)
    return files, labels


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def is_hidden(name: str) -> bool:
    """Return whether to ignore a file or folder: hidden, or created by an archiver, a NAS or a file system."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")


def walk(root: Path, place: str = "", seen: set[tuple[int, int]] | None = None, every: bool = False) -> Iterator[str]:
    """Yield the regular files below `root`/`place`, relative to `root`, in sorted order.

    Links are followed, but each folder is visited only once, so that loops end. Hidden files and folders are skipped.

    Args:
        seen: folders visited before; updated in place.
        every: include pipes, devices and broken links.

    Raises:
        UserError: a folder that can't be listed.
    """
    seen = set() if seen is None else seen
    waiting = [place] if (root / place).is_dir() else []
    while waiting:
        here = waiting.pop()
        if (identity := _identity(root / here)) in seen:
            log.warning("%s is a link to a folder that was read already; left out.", root / here)
            continue
        seen.add(identity)
        entries = _entries(root / here)
        below = [os.path.join(here, entry.name) for entry in entries if _is(entry.is_dir)]
        yield from (os.path.join(here, e.name) for e in entries if _is(e.is_file) or (every and not _is(e.is_dir)))
        waiting.extend(reversed(below))


def folders(path: Path) -> list[str]:
    """Return the names of the folders in `path`, sorted, without hidden ones."""
    return [entry.name for entry in _entries(path) if _is(entry.is_dir)]


def loose_files(path: Path) -> list[str]:
    """Return the names of everything in `path` except folders, sorted, without hidden ones."""
    return [entry.name for entry in _entries(path) if not _is(entry.is_dir)]


def printable(text: str) -> str:
    """Escape control characters and invalid UTF-8, for one line of a log."""
    decoded = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is(question: Callable[[], bool]) -> bool:
    """Return the answer of `entry.is_dir` or `entry.is_file`; False if it fails, as for a link to itself."""
    try:
        return question()
    except OSError:
        return False


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return sorted((e for e in entries if not is_hidden(e.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{path} can't be listed: {error.strerror or error}.") from error
