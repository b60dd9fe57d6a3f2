"""The unfinished file beside its target, `NAME.partial`, and what its server promised, `NAME.partial.json`."""

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Self

from src.core.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class Promise:
    """What a server said about the whole file."""

    url: str
    total: int | None = None  # bytes
    validator: str | None = None  # a strong ETag or a Last-Modified date, for If-Range
    sha256: str | None = None  # of a large file on the hub


class Partial:
    """The unfinished file, held by this process alone; bytes are only ever cut off or appended."""

    def __init__(self, target: Path, file: BinaryIO) -> None:
        self.target = target
        self.path = path_of(target)
        self._file = file

    @classmethod
    @contextmanager
    def open(cls, target: Path) -> Iterator[Self]:
        """Make the folder and take the partial file of `target`; troubles with the place become UserErrors."""
        with _place_troubles(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path_of(target), os.O_RDWR | os.O_CREAT, 0o644)
            with open(descriptor, "r+b") as file:
                _lock(file, target)
                partial = cls(target, file)
                try:
                    yield partial
                finally:
                    if partial.path.exists() and partial.size() == 0:
                        partial.path.unlink()
                        partial.forget()

    def size(self) -> int:
        """Bytes here so far."""
        return self._file.seek(0, os.SEEK_END)

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes."""
        self._file.truncate(size)

    def append(self, block: bytes) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(block)

    def start_over(self) -> None:
        self.cut(0)
        self.forget()

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Give the whole, checked file its name."""
        self.flush()
        os.replace(self.path, self.target)
        self.forget()

    def require_room(self, total: int | None) -> None:
        """UserError where the rest of `total` bytes does not fit on the disk."""
        free = shutil.disk_usage(self.path.parent).free
        rest = (total or 0) - self.size()
        if rest > free:
            raise UserError(
                f"{self.path.parent} has {free:,} bytes free and {self.target.name} needs {rest:,} more. "
                "Free some, or choose another place with --weights_dir."
            )

    def remember(self, promise: Promise) -> None:
        self._note().write_text(json.dumps(asdict(promise)), encoding="utf-8")

    def promise(self) -> Promise | None:
        """What was promised for the bytes that are here; None where that is not known."""
        try:
            return Promise(**json.loads(self._note().read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def forget(self) -> None:
        self._note().unlink(missing_ok=True)

    def _note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")


def path_of(target: Path) -> Path:
    """Where the unfinished bytes of `target` are."""
    return target.with_name(target.name + ".partial")


def _lock(file: BinaryIO, target: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"Another process is downloading {target}; wait for it.") from error
    except OSError as error:  # some network file systems have no locks
        log.warning("no file locks in %s (%s): don't start the same download twice", target.parent, error)


@contextmanager
def _place_troubles(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "the disk is full. Free space (what was downloaded is kept and continued), or choose --weights_dir"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "the place can't be written. Choose another with --weights_dir, or change its permissions"
        elif error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            advice = "there is a file where a folder must be, or the reverse. Move it away, or choose --weights_dir"
        else:
            raise
        raise UserError(f"{target}: {advice} ({error}).") from error
