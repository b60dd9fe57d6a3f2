"""Read tar files in object storage through fsspec: one ranged GET per row, by an index that is built once.

Order, crops, noise and resuming are as with local files; the cache only changes the speed. Storage options, which may
contain secrets, are never logged or written.
"""

import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from src.core.errors import UserError
from src.core.files import replacing
from src.data import index_files
from src.data.tars import TarSource

T = TypeVar("T")

WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Delay before each retry."""
CACHE_CHECK_ROWS = 32
"""Rows written between two size checks of a cache folder."""
CACHE_FOLDERS = 256


class Storage:
    """A folder or pattern of objects. Reopened in each process: connections do not survive a fork.

    options: for the fsspec file system (endpoint, keys); never shown.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url, self._options = url.rstrip("/"), dict(options or {})
        self._opened: tuple[int, Any, str] | None = None

    def __repr__(self) -> str:
        return f"Storage({self.url})"

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each tar below the URL or matching it, by name relative to it.

        Raises:
            UserError: unreachable, or no tars.
        """
        system, root = self._system()
        one_by_one = root.endswith(".tar") or any(c in root for c in "*?[")
        found = self._retry(lambda: (system.glob if one_by_one else system.find)(root, detail=True))
        names = {name[len(self._base(root)) :].lstrip("/"): name for name in sorted(found) if name.endswith(".tar")}
        if not names:
            raise UserError(
                f"No tar files at {self.url} (data.data_dir): expected a folder, a .tar, or a pattern such as s3://b/*.tar."
            )
        return {name: int(found[path]["size"]) for name, path in names.items()}

    def read(self, name: str, start: int, size: int) -> bytes:
        """Read a byte range with one request, retried on network errors. Raises UserError."""
        system, root = self._system()
        return self._retry(lambda: system.cat_file(f"{self._base(root)}/{name}", start=start, end=start + size))

    @staticmethod
    def _base(root: str) -> str:
        """Return the folder that names are relative to."""
        before = re.split(r"[*?[]", root, maxsplit=1)[0]
        return before.rpartition("/")[0] if before != root or root.endswith(".tar") else root

    def _system(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                import fsspec

                system, root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, **self._options)
            except (ImportError, ValueError) as error:
                kind = self.url.partition(":")[0]
                raise UserError(
                    f"{self.url}: fsspec can't open {kind}:// URLs here ({error}). Install the package it needs, for s3:// "
                    '`pip install -e ".[storage]"`.'
                ) from error
            self._opened = os.getpid(), system, root
        return self._opened[1], self._opened[2]

    def _retry(self, call: Callable[[], T]) -> T:
        began, waits = time.monotonic(), iter(WAITS_S)
        while True:
            try:
                return call()
            except Exception as error:  # each storage backend raises its own
                tried = f" Tried {len(WAITS_S) + 1} times within {time.monotonic() - began:.0f} s."
                if final := isinstance(error, (FileNotFoundError, PermissionError)):
                    tried = ""
                if final or (wait := next(waits, None)) is None:
                    said = f"{self.url}: {type(error).__name__}: {error}.{tried}"
                    raise UserError(f"{said} (data.data_dir, data.storage_options)") from error
                time.sleep(wait)


@dataclass(frozen=True)
class RemoteTar:
    """An object that is read like a file (`Readable`)."""

    storage: Storage
    name: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        end = min(self.size, offset + size)
        return self.storage.read(self.name, offset, end - offset) if end > offset else b""


class RemoteTarSource(TarSource):
    """Samples of tars in object storage. Pickles as its arguments.

    names: relative to the URL. cache_gb: size of the local cache; 0: none.

    Raises:
        UserError: unreachable, or as TarSource.
    """

    threads, header_bytes = 16, 1 << 20
    """Headers lie between the images, so indexing downloads everything except parts of large images."""

    def __init__(self, storage: Storage, names: Sequence[str], label: str | None, cache_gb: float = 0.0) -> None:
        self._arguments = storage, names, label, cache_gb
        sizes = {name: storage.sizes[name] for name in names}
        folder = index_files.user_cache() / "remote"
        folder.mkdir(parents=True, exist_ok=True)
        what, state = {"url": storage.url}, list(sizes.values())
        self._set_up(storage.url, folder, sizes, label, what, state, lambda name: RemoteTar(storage, name, sizes[name]))
        images = index_files.user_cache() / "images" / index_files.digest(self.key)
        self._cache = Cache(images, cache_gb) if cache_gb else None

    def name(self, index: int) -> str:
        return f"row {index} in {self.place}/{self.names[self.file_of(index)]}"

    def read(self, number: int, offset: int, size: int) -> bytes:
        if self._cache is None:
            return super().read(number, offset, size)
        key = f"{number}-{offset}"
        if (data := self._cache.get(key)) is None:
            data = super().read(number, offset, size)
            self._cache.put(key, data)
        return data


class Cache:
    """Rows cached on local disk up to a size limit, evicted least recently used first. Shared by all processes.

    Each folder has an equal share of the limit, so that a size check need not list millions of files.
    """

    def __init__(self, folder: Path, limit_gb: float) -> None:
        self.folder, self.limit = folder, limit_gb * 1e9
        self._puts = 0

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Store a row; a full disk is not an error."""
        with suppress(OSError):
            with replacing(path := self._path(key), durable=False) as file:
                file.write(data)
            if self._puts % CACHE_CHECK_ROWS == 0:
                self._shrink(path.parent)
            self._puts += 1

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:2] / key

    def _shrink(self, folder: Path) -> None:
        files = []
        for entry in os.scandir(folder):
            with suppress(OSError):
                status = entry.stat()
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        size = sum(file[1] for file in files)
        for _, length, path in sorted(files):
            if size <= self.limit / CACHE_FOLDERS:
                return
            Path(path).unlink(missing_ok=True)
            size -= length


def is_remote(data_dir: str | Path) -> bool:
    """Return whether this is the URL of object storage, `s3://bucket/folder`."""
    scheme, found, _ = str(data_dir).partition("://")
    return bool(found) and scheme.isalnum()
