"""Fingerprint data by relative file names, sizes, rows and fixed byte ranges, never by modification times.

The cost is bounded: three ranges are read from each of at most `SAMPLED` evenly spread files per source.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.core.text import flat
from src.data.latents import LatentStore
from src.data.packed import OpenFile, PackedSource
from src.data.remote import RemoteTarSource
from src.data.sources import FileSource, Source, short_digest

SAMPLED = 512
RANGE = 4096
"""Bytes read at the start, in the middle and at the end of a file."""
LISTED = 4096
"""Most files or folders listed individually; more become one entry."""
Entries = dict[str, list[Any]]


def source_state(source: Source) -> dict[str, Any]:
    """Return a source's rows and, per file (image files: per folder), [size or number of files, digest]; for stored latents
    also their scale."""
    if isinstance(source, FileSource):
        entries = _folders(source.root, list(source.names))
    elif isinstance(source, RemoteTarSource):
        entries = {name: [size, ""] for name, size in source.sizes.items()}
    elif isinstance(source, PackedSource):
        entries = _packed(source.files)
    else:
        entries = {"": [len(source), source.fingerprint()]}
    if len(entries) > LISTED:
        digest = short_digest(repr(sorted(entries.items())).encode("utf-8", "surrogateescape"))
        entries = {"": [len(entries), digest]}
    scale = {"scale": source.scale} if isinstance(source, LatentStore) else {}  # recorded only in the index
    return {"rows": len(source), "files": entries, **scale}


def compare_fingerprints(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return the differences between a checkpoint's data and the current data, as text; empty if they are the same."""
    found: list[str] = []
    before, now = stored.get("sources") or {}, own.get("sources") or {}
    for name in [*before, *(name for name in now if name not in before)]:
        if name in now and name in before:
            found += [f"{name}: {change}" for change in _changes(before[name], now[name])]
        else:
            found.append(f"{name}: {'new' if name in now else 'gone'}")
    if not found:
        was, is_now = (flat({**one, "sources": None}) for one in (stored, own))
        found = [
            f"{key}: {was.get(key)}, now {is_now.get(key)}"
            for key in sorted(was.keys() | is_now.keys())
            if was.get(key) != is_now.get(key)
        ]
    return found


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = before.get("files") or {}, now.get("files") or {}
    found = [f"{name or 'a file'} is gone" for name in old if name not in new]
    found += [f"{name or 'a file'} is new" for name in new if name not in old]
    for name in old:
        if name in new and list(old[name]) != list(new[name]):
            sizes = "" if old[name][0] == new[name][0] else f" ({old[name][0]:,}, now {new[name][0]:,})"
            found.append(f"{name or 'the files'} changed{sizes}")
    if not found and before.get("rows") != now.get("rows"):
        found.append(f"{before.get('rows'):,} images, now {now.get('rows'):,}")
    if "scale" in before and before["scale"] != now.get("scale"):
        found.append(f"latents are {now.get('scale')}, were {before['scale']}")
    return found


def _packed(files: Sequence[Path]) -> Entries:
    root = os.path.commonpath([file.parent for file in files])
    sampled = set(_sampled_indices(len(files)))
    return {
        os.path.relpath(file, root): [file.stat().st_size, _ranges(file) if i in sampled else ""]
        for i, file in enumerate(files)
    }


def _folders(root: Path, files: Sequence[str]) -> Entries:
    digests: dict[str, Any] = {}
    counts: dict[str, int] = {}
    sampled = set(_sampled_indices(len(files)))
    for i, file in enumerate(files):
        folder, name = os.path.split(file)
        digest = digests.setdefault(folder, hashlib.sha256())
        digest.update(os.fsencode(name) + b"\0")
        if i in sampled:
            digest.update(_ranges(root / file).encode())
        counts[folder] = counts.get(folder, 0) + 1
    return {folder or ".": [counts[folder], digest.hexdigest()[:16]] for folder, digest in digests.items()}


def _sampled_indices(count: int) -> Sequence[int]:
    return range(count) if count <= SAMPLED else [i * count // SAMPLED for i in range(SAMPLED)]


def _ranges(file: Path) -> str:
    """Return a digest of a file's size and three ranges; empty if it can't be read."""
    try:
        if not file.is_file():
            return ""
        opened = OpenFile(file)
        places = (0, max(0, opened.size // 2 - RANGE // 2), max(0, opened.size - RANGE))
        return short_digest(b"".join([str(opened.size).encode(), *(opened.read(place, RANGE) for place in places)]))
    except OSError:
        return ""
