"""Write files atomically, and check beforehand that they may be written."""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from src.core.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parents[2]
_UNFINISHED: set[Path] = set()


def expanded(path: str | Path) -> Path:
    """Put home folders for `~` and `~user`; a name such as `~old`, which is no user's, stays (pathlib raises)."""
    return Path(os.path.expanduser(path))


def resolve(path: str | Path) -> Path:
    """Make a path absolute: relative ones are relative to the project root, whatever the working directory."""
    path = expanded(path)
    return path if path.is_absolute() else PROJECT_ROOT / path


@contextmanager
def replacing(path: str | Path, tag: str | None = None, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a file that takes the name `path` when the block ends without an error; until then it lies beside it.

    Args:
        path: folders above it are made.
        tag: tells apart those who write the same file at once; None: this process. What a killed process leaves under a
            fixed tag, the next one overwrites.
        durable: all of it is on the disk at the end; false, where thousands of small files would wait for that.
    """
    path = Path(path)
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid() if tag is None else tag}.writing")
    _UNFINISHED.add(beside)
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        put_in_place(beside, path)
        if durable:
            _sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)
        _UNFINISHED.discard(beside)


def put_in_place(source: Path, target: Path) -> None:
    """Rename `source` to `target`, which is replaced. On Windows that fails while someone reads the target: try for 3 s."""
    for _ in range(30):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(0.1)
    os.replace(source, target)


def remove_unfinished() -> None:
    """Remove what this process has begun to write, before it ends without unwinding."""
    for path in list(_UNFINISHED):
        with suppress(OSError):
            path.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_torch(path: str | Path, content: Any, tag: str | None = None) -> None:
    """Write with torch.save. `tag`: as of `replacing`."""
    import torch

    with replacing(path, tag) as file:
        target = _Remembering(file)
        try:
            torch.save(content, target)
        except RuntimeError as error:  # what torch makes of a full disk when it closes the archive
            raise target.failure or error from error


def write_safetensors(path: str | Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in place. OSError where the disk refuses, which the library makes an error of its own."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


class _Remembering:
    """Passes on what is written and remembers the first error, which torch.save replaces by one of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self._file.flush()


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""What the system says of a disk that is full, over quota, read-only, broken or gone from the network."""


def disk_message(error: OSError, path: str | Path | None = None) -> str:
    """Return the message for a file that can't be written."""
    name = path or error.filename or "A file"
    return (
        f"{os.fsdecode(name) if isinstance(name, bytes) else name} can't be written: {error.strerror or error}. Make room (or set "
        "paths.log_dir to another place); what was saved before is untouched, ckpt_path=last goes on from it."
    )


def file_digest(path: str | Path, algorithm: str) -> str:
    """Return the lower-case hex digest of a file: `sha256`, `md5`, or `git` for what `git hash-object` prints."""
    with open(path, "rb") as file:
        if algorithm == "git":
            start = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        else:
            start = hashlib.new(algorithm, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: start).hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give `source` the second name `target`, replacing what was there; copy where the file system has no hard links."""
    beside = target.with_name(f".{target.name}.link")
    beside.unlink(missing_ok=True)
    _UNFINISHED.add(beside)
    try:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)
        put_in_place(beside, target)
    finally:
        beside.unlink(missing_ok=True)
        _UNFINISHED.discard(beside)


def check_folder(folder: Path, overwrite: bool, marks: Sequence[str], what: str, option: str = "--output") -> None:
    """Raise UserError unless a program may write a new folder, or (`overwrite`) replace an earlier one of its own.

    Args:
        marks: names of files; one of them is in every folder that the program wrote.
        what: the program's name for such a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder} is a file; give a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not any((folder / mark).is_file() for mark in marks):
        raise UserError(
            f"{option} {folder} is not empty and holds no {' and no '.join(marks)}: it is no {what}, so --overwrite "
            "does not delete it. Choose another folder."
        )
    if not overwrite:
        raise UserError(f"{option} {folder} is there already. Choose another folder, or replace it with --overwrite.")


def check_writable(file: Path, option: str) -> None:
    """Check before long work that `file` can be written at its end; folders above it are made. Raises UserError."""
    _check_replaceable(file, f"{option} ")
    try:
        with replacing(file.with_name(f".{file.name}.probe"), durable=False):
            pass
        file.with_name(f".{file.name}.probe").unlink()
    except OSError as error:
        raise UserError(
            f"{option} {file} can't be written: {error.strerror or error}. Choose another place."
        ) from error


def _check_replaceable(path: Path, option: str = "") -> None:
    """Raise UserError where a rename would fail or, as root, take the place of a device such as /dev/null."""
    if path.exists() and not path.is_file():
        raise UserError(f"{option}{path} is a {'folder' if path.is_dir() else 'device'}; give the name of a file.")


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # elsewhere than on POSIX, folders can't be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
