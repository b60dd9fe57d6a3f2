"""Read encoded images packed in large files by file offset: one `pread` per row.

Files are opened lazily, at the first row read from each, and without read-ahead, which would fetch megabytes for every row
of a shuffled dataset.
"""

import bisect
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from src.data.decode import BadImage
from src.data.sources import MAX_FILE_BYTES

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

OPEN_FILES = 512
"""Most files that a process keeps open for all its sources; a quarter of its limit if that is less."""
NO_BYTES = 0xFFFFFFFF
"""Size of a row whose bytes are not in the file."""
_SOURCES: "weakref.WeakSet[PackedSource]" = weakref.WeakSet()
"""All sources of this process, which share `OPEN_FILES`."""


class Readable(Protocol):
    """An open file, or an object in a bucket."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on; fewer only at the end of the file."""


class Damaged(Exception):
    """A packed file can't be read; the message gives the reason and, in its last sentence, the remedy."""

    def __init__(self, reason: str, remedy: str = "Copy or download it again.") -> None:
        super().__init__(f"{reason}. {remedy}")


@dataclass(frozen=True)
class FileRows:
    """Rows of one file. offsets (n,) int64, bytes; sizes (n,) uint32, bytes, `NO_BYTES` if the image is not in the file;
    labels (n,) integers, -1 for none; None if there are no labels."""

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray | None


@dataclass(frozen=True)
class PackedIndex:
    """Positions of n rows in files, ordered by file and row. The arrays may be memory-mapped.

    starts: (files + 1,) int64, the first row of each file, then n. The others as in `FileRows`.
    """

    starts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray | None = None

    @classmethod
    def of_files(cls, parts: Sequence[FileRows]) -> "PackedIndex":
        """Concatenate the rows of several files."""
        starts = np.cumsum([0, *(len(part.offsets) for part in parts)], dtype=np.int64)
        labelled = all(part.labels is not None for part in parts)
        columns = ("offsets", "sizes", "labels") if labelled else ("offsets", "sizes")
        return cls(starts, *(np.concatenate([getattr(part, column) for part in parts]) for column in columns))


class PackedSource:
    """Rows read through an index. Subclasses for each file format add `name` and `fingerprint`.

    Pickles as `_arguments`, the subclass's constructor arguments, so each process opens the files itself.
    """

    _arguments: tuple[Any, ...]

    def __init__(
        self,
        files: Sequence[Path],
        index: PackedIndex,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        open_file: Callable[[int], Readable] | None = None,
    ) -> None:
        """num_classes: None derives it from names and labels. open_file: opens a file by its number; None: from disk."""
        self.files, self.index = files, index
        self.class_names: Sequence[str] | None = list(class_names) if class_names else None
        self.num_classes = num_classes
        if index.labels is not None and num_classes is None:
            self.num_classes = max(len(class_names or ()), int(index.labels.max(initial=-1)) + 1)
        self._starts: list[int] = index.starts.tolist()
        self._open_file = open_file or (lambda number: OpenFile(files[number]))
        self._open: dict[int, Readable] = {}  # most recently read last
        _SOURCES.add(self)

    def __len__(self) -> int:
        return self._starts[-1]

    def encoded(self, index: int) -> bytes:
        number = self.file_of(index)
        size = int(self.index.sizes[index])
        if size == NO_BYTES:
            return self._read_external(index)
        if size > MAX_FILE_BYTES:
            raise BadImage(f"a file of {size:,} bytes")
        return self.read(number, int(self.index.offsets[index]), size)

    def label(self, index: int) -> int | None:
        return int(self.index.labels[index]) if self.index.labels is not None else None

    def file_of(self, index: int) -> int:
        """Return the number of the file that holds a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return bisect.bisect_right(self._starts, index) - 1

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes of a file. Raises BadImage if that fails."""
        try:
            data = self._opened(number).read(offset, size)
        except OSError as error:
            raise BadImage(f"can't be read: {error.strerror or error}") from error
        if len(data) < size:
            raise BadImage(f"it lies beyond the end of {self.files[number]}")
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def _opened(self, number: int) -> Readable:
        held = self._open.pop(number, None)
        file = self._open[number] = held or self._open_file(number)
        while len(self._open) > max(1, open_files_limit() // len(_SOURCES)):
            self._open.pop(next(iter(self._open)), None)
        return file

    def _read_external(self, index: int) -> bytes:
        raise BadImage("no bytes in its row")


class OpenFile:
    """A file read by offset. Closed with its last reference, so that no thread loses it while reading."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        # O_BINARY: without it Windows changes line ends
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        data = _pread(self._descriptor, size, offset)
        while 0 < len(data) < size and (more := _pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _seek_and_read(descriptor: int, size: int, offset: int) -> bytes:
    with _SEEKING:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


_SEEKING = threading.Lock()
_pread = getattr(os, "pread", _seek_and_read)  # for Windows


def open_files_limit() -> int:
    """Return the most files that a process keeps open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource is not None else -1
    return OPEN_FILES if soft < 0 else max(4, min(OPEN_FILES, soft // 4))  # RLIM_INFINITY is -1
