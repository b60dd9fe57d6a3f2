"""Open tar files of images, read in place through an index that is made once."""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from src.core.errors import UserError
from src.data import index_files
from src.data.decode import BadImage
from src.data.packed import Damaged, OpenFile, PackedIndex, PackedSource
from src.data.tar_index import BLOCK, ODD_LABEL, TarRows, check_label, header_name, index_tar

log = logging.getLogger(__name__)

VERSION = 2
"""Of what the index says; another one makes it anew."""


class TarSource(PackedSource):
    """Samples with an image of tar files, in the order of the names. Pickles as its arguments.

    root: folder that the names are relative to. label: None for `.cls` where there are whole numbers in it, `cls`, or
    `json:KEY`.

    Raises:
        UserError: cut short, compressed, no tar, without images, or without the labels wanted.
    """

    def __init__(self, root: Path, names: Sequence[str], label: str | None = None, quiet: bool = False) -> None:
        self._arguments: tuple[Any, ...] = root, list(names), label, True
        self.root = root
        status = {}
        for name in names:
            try:
                status[name] = (root / name).stat()
            except OSError as error:
                raise UserError(f"{root / name} can't be read: {error.strerror or error}.") from error
        sizes = {name: found.st_size for name, found in status.items()}
        self._set_up(str(root), root, sizes, label, {}, [(s.st_size, s.st_mtime_ns) for s in status.values()], quiet)

    def _set_up(
        self, place: str, root: Path, sizes: Mapping[str, int], label: str | None, what: Any, state: Any, quiet: bool
    ) -> None:
        """Find or make the index. place: for messages; root: whose folder keeps the index; what, state: its keys."""
        check_label(label)
        self.place, self.sizes, self.names = place, dict(sizes), list(sizes)
        self.key = {"version": VERSION, "names": self.names, "label": label or "cls", **what}
        found = index_files.find_or_build(root, self.key, state, lambda: join(list(self._index(label))))
        self.index_path, self.index_built, header = found.path, found.built, found.header
        labels, count = usable_labels(found, label, place)
        super().__init__([self.root / n for n in self.names], replace(found.index, labels=labels), num_classes=count)
        if not len(self):
            raise UserError(
                f"No images in the {len(self.names)} tar files of {place} (data.data_dir): expected members such as 0001.jpg. "
                f"Samples there: {', '.join(header['examples']) or 'none'}."
            )
        if header["without_image"] and not quiet:
            log.warning(
                "%s: %s samples have no image and are left out, such as %s.",
                place, f"{header['without_image']:,}", ", ".join(header["examples"]),
            )  # fmt: skip

    def name(self, index: int) -> str:
        file = f"{self.place}/{self.names[self.file_of(index)]}"
        try:
            return f"{self.member(index)} in {file}"
        except BadImage:
            return f"row {index} in {file}"

    def member(self, index: int) -> str:
        """Return the name of the row's member; of a long one the beginning. Raises BadImage where it can't be read."""
        number = self.file_of(index)
        return header_name(self.read(number, int(self.index.offsets[index]) - BLOCK, BLOCK))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.index.starts.tobytes())
        for name, size in self.sizes.items():
            digest.update(f"{name}:{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def _index(self, label: str | None) -> Iterator[TarRows]:
        log.info("Indexing %s tar files of %s, once.", f"{len(self.names):,}", self.place)
        began = time.monotonic()
        for number, name in enumerate(self.names):
            yield read_tar(self.root / name, label)
            if time.monotonic() - began > 30:
                log.info("Indexed %s of %s tar files.", f"{number + 1:,}", f"{len(self.names):,}")
                began = time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


def read_tar(path: Path, label: str | None) -> TarRows:
    """Index one tar. Raises UserError where it can't be read."""
    try:
        return index_tar(OpenFile(path), label)
    except (Damaged, OSError) as error:
        size = f" ({path.stat().st_size:,} bytes)" if path.is_file() else ""
        raise UserError(f"{path}{size} can't be read as a tar: {error}") from error


def join(parts: Sequence[TarRows]) -> tuple[PackedIndex, dict[str, Any]]:
    """Make one index, and the header that is kept with it, of the rows of several tars."""
    index = PackedIndex.of_files(parts)
    assert index.labels is not None
    header = {
        "without_image": sum(part.without_image for part in parts),
        "examples": [name for part in parts for name in part.examples][:3],
        "odd_labels": int(np.count_nonzero(index.labels == ODD_LABEL)),
        "largest_label": int(np.max(index.labels, initial=-1)),
    }
    return index, header


def usable_labels(found: index_files.Found, label: str | None, place: object) -> tuple[np.ndarray | None, int | None]:
    """Return the labels of an index and how many classes they count; None where not all of them are whole numbers.

    Raises:
        UserError: such labels, but asked for.
    """
    header, largest = found.header, found.header["largest_label"]
    if not header["odd_labels"] and largest >= 0:
        return found.index.labels, largest + 1
    if label is None:
        return None, None
    count = f"{header['odd_labels']:,} of" if largest >= 0 else "all of"
    raise UserError(
        f"data.label={label}: {count} the {len(found.index.offsets):,} samples in {place} have no whole number there. "
        "Set data.label to `cls`, to `json:KEY` of another key, or to null."
    )
