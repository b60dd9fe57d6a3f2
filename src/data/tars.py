"""Open tar files of images, which are read in place through an index that is built once."""

import logging
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from src.core.errors import UserError
from src.data import index_files
from src.data.decode import BadImage
from src.data.packed import Damaged, OpenFile, PackedIndex, PackedSource, Readable
from src.data.sources import short_digest
from src.data.tar_index import BLOCK, HEADER_BYTES, ODD_LABEL, TarRows, check_label, header_name, index_tar

log = logging.getLogger(__name__)

VERSION = 2
"""Version of the index; cached indexes of other versions are rebuilt."""


class TarSource(PackedSource):
    """Samples of tar files that have an image, in the order of `names`. Pickles as its arguments.

    root: folder that the names are relative to. label: `cls`, `json:KEY`, or None for `.cls` if all are whole numbers.

    Raises:
        UserError: truncated, compressed, not a tar, without images, or without the requested labels.
    """

    threads, header_bytes = 1, HEADER_BYTES
    """For indexing: tars read in parallel, and bytes read at once."""

    def __init__(self, root: Path, names: Sequence[str], label: str | None = None, quiet: bool = False) -> None:
        self._arguments = root, list(names), label, True
        try:
            status = {name: (root / name).stat() for name in names}
        except OSError as error:
            raise UserError(f"{error.filename} can't be read: {error.strerror or error}.") from error
        sizes = {name: found.st_size for name, found in status.items()}
        state = [(found.st_size, found.st_mtime_ns) for found in status.values()]
        self._set_up(str(root), root, sizes, label, {}, state, lambda name: OpenFile(root / name), quiet)

    def _set_up(
        self,
        place: str,
        root: Path,
        sizes: Mapping[str, int],
        label: str | None,
        what: Any,
        state: Any,
        open_tar: Callable[[str], Readable],
        quiet: bool = False,
    ) -> None:
        """Find or build the index. place: for messages; root: folder of the cached index; what, state: its keys."""
        check_label(label)
        self.place, self.sizes, self.names = place, dict(sizes), list(sizes)
        self.key = {"version": VERSION, "names": self.names, "label": label or "cls", **what}
        found = index_files.find_or_build(root, self.key, state, lambda: join(list(self._index(label, open_tar))))
        self.index_path, self.index_built, header = found.path, found.built, found.header
        labels, count = usable_labels(found, label, place)
        files, index = [root / name for name in self.names], replace(found.index, labels=labels)
        super().__init__(files, index, num_classes=count, open_file=lambda number: open_tar(self.names[number]))
        if not len(self):
            raise UserError(
                f"No images in the {len(self.names)} tar files of {place} (data.data_dir): expected members such as 0001.jpg, "
                f"with one dot. Members there: {', '.join(header['examples']) or 'none'}."
            )
        if header["without_image"] and not quiet:
            log.warning(
                "%s: %s samples have no image such as 0001.jpg, with one dot, and are left out: %s, ...",
                place, f"{header['without_image']:,}", ", ".join(header["examples"]),
            )  # fmt: skip

    def name(self, index: int) -> str:
        file = f"{self.place}/{self.names[self.file_of(index)]}"
        try:
            return f"{self.member(index)} in {file}"
        except BadImage:
            return f"row {index} in {file}"

    def member(self, index: int) -> str:
        """Return the name of the row's member; of a long one, the beginning. Raises BadImage if it can't be read."""
        number = self.file_of(index)
        try:
            return header_name(self.read(number, int(self.index.offsets[index]) - BLOCK, BLOCK))
        except tarfile.HeaderError as error:
            raise BadImage(f"no header before it: {error}") from error

    def fingerprint(self) -> str:
        sizes = "".join(f"{name}:{size}\0" for name, size in self.sizes.items())
        return short_digest(self.index.starts.tobytes() + sizes.encode("utf-8", "surrogateescape"))

    def _index(self, label: str | None, open_tar: Callable[[str], Readable]) -> Iterator[TarRows]:
        def index(name: str) -> TarRows:
            try:
                return index_tar(open_tar(name), label, self.header_bytes)
            except (Damaged, OSError) as error:
                size = f" ({self.sizes[name]:,} bytes)"
                raise UserError(f"{self.place}/{name}{size} can't be read as a tar: {error}") from error

        count = f"{len(self.names):,}"
        log.info("Indexing %s tar files of %s, once.", count, self.place)
        began = time.monotonic()
        with ThreadPoolExecutor(self.threads) as pool:
            for number, rows in enumerate(pool.map(index, self.names), 1):
                yield rows
                if time.monotonic() - began > 30:
                    log.info("Indexed %s of %s tar files.", f"{number:,}", count)
                    began = time.monotonic()


def join(parts: Sequence[TarRows]) -> tuple[PackedIndex, dict[str, Any]]:
    """Return the index of several tars, and a summary of it for its header."""
    index = PackedIndex.of_files(parts)
    assert index.labels is not None
    return index, {
        "without_image": sum(part.without_image for part in parts),
        "examples": [name for part in parts for name in part.examples][:3],
        "odd_labels": int(np.count_nonzero(index.labels == ODD_LABEL)),
        "largest_label": int(np.max(index.labels, initial=-1)),
    }


def usable_labels(found: index_files.Found, label: str | None, place: str) -> tuple[np.ndarray | None, int | None]:
    """Return the labels of an index and the number of classes; None, None if not all labels are whole numbers.

    Raises:
        UserError: such labels were requested.
    """
    odd, largest = found.header["odd_labels"], found.header["largest_label"]
    if not odd and largest >= 0:
        return found.index.labels, largest + 1
    if label is None:
        return None, None
    raise UserError(
        f"data.label={label}: {f'{odd:,} of' if largest >= 0 else 'all of'} the {len(found.index.offsets):,} samples in {place} "
        "have no whole number there. Set data.label to `cls`, to `json:KEY` of another key, or to null."
    )
