"""Files that are there whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: str | Path, tag: str | None = None, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block ends without an error; until then it lies beside it. Folders above it are
    made. `durable`: all of it is on the disk by then; false, where thousands of small files would wait for that.

    `tag` tells apart those who write the same file at once; None: this process. What a killed process leaves under a
    fixed tag, the next one overwrites.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid() if tag is None else tag}.writing")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(beside, path)
        if durable:
            _sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def file_digest(path: str | Path, algorithm: str) -> str:
    """Return the lower-case hex digest of a file: `sha256`, `md5`, or `git` for what `git hash-object` prints."""
    with open(path, "rb") as file:
        if algorithm == "git":
            start = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        else:
            start = hashlib.new(algorithm, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: start).hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for `source`, replacing `target` at once; a copy where the file system has no hard links."""
    beside = target.with_name(f".{target.name}.link")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        shutil.copyfile(source, beside)
    os.replace(beside, target)


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # elsewhere than on POSIX, folders can't be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
