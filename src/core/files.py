"""Write files atomically: a reader finds the old content or the new one, never a part of it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


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
    """Write UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_torch(path: str | Path, content: Any, tag: str | None = None) -> None:
    """Write with torch.save. `tag`: as of `replacing`."""
    import torch

    with replacing(path, tag) as file:
        torch.save(content, file)


def link_or_copy(source: Path, target: Path) -> None:
    """Give `source` the second name `target`, replacing what was there; copy where the file system has no hard links."""
    beside = target.with_name(f".{target.name}.link")
    beside.unlink(missing_ok=True)
    try:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # elsewhere than on POSIX, folders can't be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
