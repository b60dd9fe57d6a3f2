"""Lock files, and lock a run folder while the run is active."""

import os
import socket
from pathlib import Path
from typing import IO, Any

from src.core.errors import UserError

try:
    import fcntl
except ImportError:  # not on POSIX
    fcntl = None  # type: ignore[assignment]

NAME = ".running"


def lock(file: IO[Any], kind: str = "LOCK_EX", wait: bool = False) -> None:
    """Lock an open file until it is closed or this process ends, however it ends.

    Does nothing where the platform or file system has no locks (no `fcntl` on Windows, Lustre without `-o flock`).
    Raises BlockingIOError if another process holds the lock, unless `wait` is set.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, getattr(fcntl, kind) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass


def take_lock(
    folder: Path,
    remedy: str = "Wait until it ends or stop it (kill -INT lets it save), or choose another folder (paths.run_dir=null makes "
    "a new one).",
) -> IO[str]:
    """Lock a run folder until the returned file is closed. UserError: another run is active in it, or it isn't writable."""
    try:
        file = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115
        owner = _other_owner(file, "LOCK_EX")
        if not owner:
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()
    except OSError as error:
        raise UserError(
            f"{folder} can't be written: {error.strerror}. Choose another folder (paths.log_dir, --output)."
        ) from error
    raise UserError(f"A run is still going on in {folder} ({owner}). {remedy}")


def owner_of(folder: Path) -> str:
    """Return which process holds the lock of a run folder; empty if none does or it can't be determined."""
    try:
        with open(folder / NAME, encoding="utf-8") as file:
            return _other_owner(file, "LOCK_SH")
    except OSError:
        return ""


def _other_owner(file: IO[str], kind: str) -> str:
    """Lock an open file; return which other process holds it instead, empty if none does or it can't be determined."""
    try:
        lock(file, kind)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    return ""
