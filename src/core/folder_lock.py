"""Lock a run's folder while the run lives."""

import os
import socket
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # elsewhere than on POSIX
    fcntl = None  # type: ignore[assignment]

NAME = ".running"


def lock(folder: Path) -> tuple[IO[str] | None, str]:
    """Return (lock, owner): a lock on `folder`, held until it is closed or this process ends, however it ends.

    None where another process holds it; `owner` then says which. Where the file system or the platform has no locks (no
    `fcntl` on Windows, Lustre without `-o flock`), an open file that locks nothing.
    """
    file = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            return None, owner or "another process"
        except OSError:
            return file, ""
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file, ""


def owner_of(folder: Path) -> str:
    """Return which process holds the lock of a run's folder; empty where none does, or nobody can tell."""
    if fcntl is None or not (folder / NAME).is_file():
        return ""
    try:
        with open(folder / NAME, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        pass
    return ""
