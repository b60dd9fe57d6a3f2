"""Cache the index of packed files on disk, to be memory-mapped: a line of JSON, then 16 bytes per row (`ROW`)."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.core.files import replacing
from src.core.folder_lock import lock
from src.data.packed import PackedIndex
from src.data.sources import short_digest

ROW = np.dtype([("offset", "<i8"), ("size", "<u4"), ("label", "<i4")])
FOLDER = ".image_index"
"""Folder beside the data; if that is not writable, the user's cache folder is used."""


class Found(NamedTuple):
    """An index, its header, the file it is mapped from, and whether it was just built."""

    index: PackedIndex
    header: dict[str, Any]
    path: Path
    built: bool


def find_or_build(root: Path, what: Any, state: Any, build: Callable[[], tuple[PackedIndex, dict[str, Any]]]) -> Found:
    """Map the cached index of files below `root`, or build and cache it, in one process at a time.

    what: plain values that identify the files and how they are read. state: plain values that change with their contents
    (sizes, times); an index of another state is deleted. Without file locks, two processes may build the same index.
    """
    name = f"{digest(what)}-{digest(state)}.idx"
    beside = root / FOLDER
    writable = os.access(beside if beside.is_dir() else root, os.W_OK)
    place = beside if writable else user_cache() / "index"
    for folder in dict.fromkeys((beside, place)):
        if (found := read(folder / name)) is not None:
            return found
    place.mkdir(parents=True, exist_ok=True)
    with open(place / f"{digest(what)}.lock", "ab") as held:
        lock(held, wait=True)
        if (found := read(place / name)) is not None:
            return found
        write(place / name, *build())
        for old in place.glob(f"{digest(what)}-*.idx"):
            if old.name != name:
                with suppress(OSError):
                    old.unlink()
    found = read(place / name)
    if found is None:
        raise OSError(f"the index just written can't be read: {place / name}")
    return found._replace(built=True)


def digest(value: Any) -> str:
    """Return a digest of plain values, 16 hex digits."""
    return short_digest(json.dumps(value, sort_keys=True).encode())


def write(path: Path, index: PackedIndex, header: dict[str, Any]) -> None:
    """Write an index atomically. header: plain values stored with it."""
    rows = np.empty(int(index.starts[-1]), ROW)
    rows["offset"], rows["size"] = index.offsets, index.sizes
    rows["label"] = -1 if index.labels is None else index.labels
    with replacing(path) as file:
        file.write(json.dumps(header | {"starts": index.starts.tolist()}).encode() + b"\n")
        file.write(rows.data)


def read(path: Path) -> Found | None:
    """Map an index; None if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
        header = json.loads(line)
        starts = np.array(header.pop("starts"), np.int64)
        rows = np.asarray(np.memmap(path, ROW, "r", len(line))) if starts[-1] else np.empty(0, ROW)
        if len(rows) != starts[-1]:
            return None
        return Found(PackedIndex(starts, *(rows[name] for name in ROW.names or ())), header, path, False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, RecursionError):
        return None


def user_cache() -> Path:
    """Return the cache folder, for files that can be rebuilt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rae"
