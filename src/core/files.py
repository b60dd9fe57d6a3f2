"""Write files atomically, and check beforehand that they can be written."""

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
_TEMPORARY_FILES: set[Path] = set()


def expanded(path: str | Path) -> Path:
    """Expand `~` and `~user`; a name such as `~old` that is no user's is kept (pathlib would raise)."""
    return Path(os.path.expanduser(path))


def resolve(path: str | Path) -> Path:
    """Return an absolute path; relative ones are relative to the project root, not to the working directory."""
    path = expanded(path)
    return path if path.is_absolute() else PROJECT_ROOT / path


@contextmanager
def replacing(path: str | Path, tag: str | None = None, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file next to `path`, renamed to `path` when the block ends without an error.

    Args:
        path: missing parent folders are created.
        tag: part of the temporary name, different for concurrent writers of `path`; None: the process id. With a fixed tag,
            what a killed process left is overwritten by the next.
        durable: fsync file and folder; False for thousands of small files, where that would be slow.
    """
    path = Path(path)
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid() if tag is None else tag}.writing")
    _TEMPORARY_FILES.add(temporary)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        put_in_place(temporary, path)
        if durable:
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        _TEMPORARY_FILES.discard(temporary)


def put_in_place(source: Path, target: Path) -> None:
    """Rename `source` to `target`, replacing it. On Windows that fails while a process reads the target: retry for 3 s."""
    for _ in range(30):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(0.1)
    os.replace(source, target)


def remove_unfinished() -> None:
    """Remove the temporary files of this process, before it exits without unwinding."""
    for path in list(_TEMPORARY_FILES):
        with suppress(OSError):
            path.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_torch(path: str | Path, content: Any, tag: str | None = None) -> None:
    """Write with torch.save, atomically. `tag`: see `replacing`."""
    import torch

    with replacing(path, tag) as file:
        target = _ErrorRecorder(file)
        try:
            torch.save(content, target)
        except RuntimeError as error:  # torch's own, when it closes the archive on a full disk
            raise target.failure or error from error


def write_safetensors(path: str | Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file directly to `path`. Raises OSError on disk errors, where the library has its own class."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


class _ErrorRecorder:
    """File wrapper that remembers the first write error, which torch.save replaces by one of its own."""

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
"""The errno of a disk that is full, over quota, over its file size limit, read-only, broken or gone from the network."""


def disk_message(error: OSError, path: str | Path | None = None) -> str:
    """Return the error message for a file that can't be written."""
    name = path or error.filename or "A file"
    return (
        f"{os.fsdecode(name) if isinstance(name, bytes) else name} can't be written: {error.strerror or error}. Make room (or set "
        "paths.log_dir to another folder); what was saved before is intact, ckpt_path=last resumes from it."
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
    """Hard-link `source` to `target`, replacing it; copy where the file system has no hard links."""
    temporary = target.with_name(f".{target.name}.link")
    temporary.unlink(missing_ok=True)
    _TEMPORARY_FILES.add(temporary)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        put_in_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        _TEMPORARY_FILES.discard(temporary)


def check_folder(folder: Path, overwrite: bool, marks: Sequence[str], what: str, option: str = "--output") -> None:
    """Raise UserError unless a script may write `folder`: new, empty, or (`overwrite`) one that the script wrote before.

    Args:
        marks: file names, at least one of which is in every folder that the script wrote.
        what: what messages call such a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder} is a file; give a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not any((folder / mark).is_file() for mark in marks):
        raise UserError(
            f"{option} {folder} is not empty and holds no {' and no '.join(marks)}: it is not {what}, so --overwrite "
            "does not delete it. Choose another folder."
        )
    if not overwrite:
        raise UserError(f"{option} {folder} already exists. Choose another folder, or replace it with --overwrite.")


def check_writable(file: Path, option: str) -> None:
    """Check before long work that `file` can be written at the end; creates parent folders. Raises UserError."""
    _check_replaceable(file, f"{option} ")
    try:
        with replacing(file.with_name(f".{file.name}.probe"), durable=False):
            pass
        file.with_name(f".{file.name}.probe").unlink()
    except OSError as error:
        raise UserError(f"{option} {file} can't be written: {error.strerror or error}. Choose another path.") from error


def _check_replaceable(path: Path, option: str = "") -> None:
    """Raise UserError if `path` is a folder, or a device such as /dev/null, which a rename as root would replace."""
    if path.exists() and not path.is_file():
        raise UserError(f"{option}{path} is a {'folder' if path.is_dir() else 'device'}; give the name of a file.")


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # folders can only be opened on POSIX
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
