"""Index the images of tar files (all that tarfile reads: USTAR, GNU, PAX) by reading only headers and labels.

A sample is a run of members that share a name up to the first dot, as in WebDataset. Its first image member is used:
`0001.jpg`, not `0001.mask.png`. Hidden members and members that are not regular files are skipped.
"""

import itertools
import json
import operator
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from src.core.errors import UserError
from src.data.packed import NO_BYTES, Damaged, FileRows, Readable
from src.data.sources import SUFFIXES

BLOCK = 512
PAGE = 4096
HEADER_BYTES = 2 * PAGE
"""Bytes read at once for a header and what follows it."""
NO_LABEL, ODD_LABEL = -1, -2
"""Labels of a sample that has none, and of one whose label is not a whole number >= 0."""
MAX_SMALL = 1 << 20
"""Most bytes read in one piece (long names, labels)."""
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd --rm"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
}
_IMAGES = frozenset(suffix[1:] for suffix in SUFFIXES)
_RELEVANT_PAX = re.compile(rb"path=|size=|GNU\.sparse|charset=")
"""PAX records that matter; others, such as times and owners, are ignored."""
_OCTAL = re.compile(rb"[0-7]+[\0 ]")


@dataclass(frozen=True)
class TarRows(FileRows):
    """The samples of one tar that have an image. without_image: number of samples that have none; examples: some of these."""

    without_image: int
    examples: list[str]


def check_label(label: str | None) -> None:
    """Check that `label` is one that tars can have: None, `cls` or `json:KEY`. Raises UserError."""
    if label not in (None, "cls") and not (label.startswith("json:") and label != "json:"):
        raise UserError(
            f"data.label={label}: for tars expected null, cls, or json:KEY (the key of the .json beside an image)."
        )


def index_tar(file: Readable, label: str | None = None, at_once: int = HEADER_BYTES) -> TarRows:
    """Index the samples of a tar. label: None or `cls` for the member `.cls`, `json:KEY` for a key of the member `.json`;
    at_once: bytes to read for a header and what follows it.

    Raises:
        Damaged: truncated, compressed, or not a tar.
    """
    extension, _, key = ("cls", "", "") if label is None else label.partition(":")
    window = Window(file, at_once)
    offsets, sizes, labels = [], [], []
    without, examples = 0, list[str]()
    parts = ((*_sample(found.name.removeprefix("./")), found) for found in members(window))
    for _, group in itertools.groupby((part for part in parts if part[0]), operator.itemgetter(0)):
        image, number = None, NO_LABEL
        for _, kind, found in group:
            if kind in _IMAGES:
                image = image or found
            elif kind == extension:
                number = _label(window.take(found.offset_data, min(found.size, MAX_SMALL)), key)
        if image is not None:
            offsets.append(image.offset_data)
            sizes.append(min(image.size, NO_BYTES - 1))
            labels.append(number)
        else:
            without += 1
            examples += [found.name] if len(examples) < 3 else []
    return TarRows(
        np.array(offsets, np.int64), np.array(sizes, np.uint32), np.array(labels, np.int32), without, examples
    )


def _sample(name: str) -> tuple[str, str]:
    """Return a member's sample name and its extension; empty for hidden members."""
    if name.startswith(".") or "/." in name:
        return "", ""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return folder + slash + stem, kind.lower()


def _label(data: bytes, key: str) -> int:
    try:
        value = json.loads(data)[key] if key else int(data)
    except (ValueError, KeyError, TypeError, RecursionError):
        return ODD_LABEL
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else ODD_LABEL


class Window:
    """Read short ranges of a file through a buffer of `at_once` bytes; also serves tarfile as a file object."""

    def __init__(self, file: Readable, at_once: int = HEADER_BYTES) -> None:
        self.size = file.size
        self._file, self._at_once, self._at = file, at_once, 0
        self._data, self._start = b"", 0

    def take(self, at: int, count: int) -> bytes:
        shift = at - self._start
        if not 0 <= shift <= len(self._data) - count:
            self._data, self._start, shift = self._file.read(at, max(count, self._at_once - at % PAGE)), at, 0
        return self._data[shift : shift + count]

    def seek(self, at: int) -> None:
        self._at = at

    def tell(self) -> int:
        return self._at

    def read(self, count: int) -> bytes:
        if not 0 <= count <= MAX_SMALL:
            raise Damaged(f"it is cut short or damaged at byte {self._at:,}")
        data = self.take(self._at, count)
        self._at += len(data)
        return data


def members(window: Window) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar in order. Raises Damaged, also where tarfile would mistake damage for the end."""
    start, at = window.take(0, BLOCK), 0
    if not start:
        raise Damaged("the file is empty")
    for packed, (first, tools) in COMPRESSED.items():
        if start.startswith(packed):
            raise Damaged(
                f"it is compressed with {first}, so its members can't be read one by one", f"Unpack it: `{tools} FILE`."
            )
    try:
        tar = tarfile.TarFile(fileobj=window, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
        found = tar.next()
        while found is not None:
            at = tar.offset
            tar.members.clear()  # type: ignore[attr-defined]  # millions would fill the memory
            if found.issparse():
                raise Damaged(f"its member {found.name} is sparse", "Write the tar again without --sparse.")
            if found.size < 0 or (found.isreg() and found.size > window.size - found.offset_data):
                raise Damaged(f"it is cut short within {found.name}")
            if found.isreg() and not found.name.endswith("/"):
                yield found
            found = None if tar.pax_headers else _plain_member(window, at)  # type: ignore[attr-defined]  # global ones
            if found is None:
                found = tar.next()
            else:
                tar.offset = _next_header(found.offset_data, found.size)  # type: ignore[attr-defined]
    except (tarfile.TarError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        pass  # the checks below give a better reason than tarfile
    header = window.take(at, BLOCK)
    if len(header) < BLOCK:
        raise Damaged(f"it is cut short: no end mark at byte {at:,}")
    if any(header):
        raise Damaged(f"no readable tar header at byte {at:,}")


def _plain_member(window: Window, at: int) -> tarfile.TarInfo | None:
    """Parse the header at `at` if it is a plain one of a regular file, else return None. tarfile takes four times as long."""
    header = window.take(at, BLOCK)
    if header[156:157] == b"x":
        records = _header_size(header)
        if records is None or records > MAX_SMALL or _RELEVANT_PAX.search(window.take(at + BLOCK, records)):
            return None
        at = _next_header(at + BLOCK, records)
        header = window.take(at, BLOCK)
    size = _header_size(header)
    if size is None or header[156:157] != b"0" or header[345]:  # another type, or a name with a prefix
        return None
    found = tarfile.TarInfo(header[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape"))
    found.offset_data, found.size = at + BLOCK, size
    return found


def _header_size(header: bytes) -> int | None:
    """Return the size in a header, in bytes; None if the checksum or a number's format is unusual and left to tarfile."""
    size, noted = header[124:136], header[148:155]
    if len(header) < BLOCK or not (_OCTAL.fullmatch(size) and _OCTAL.fullmatch(noted)):
        return None
    # The checksum's own bytes count as blanks. The low half of Adler-32 is 1 + the sum of all bytes, modulo 65521.
    whole = int(noted[:-1], 8) - 8 * ord(" ") + sum(header[148:156])
    right = zlib.adler32(header) & 0xFFFF == (whole + 1) % 65521
    return int(size[:-1], 8) if right and header[257:262] == b"ustar" else None


def _next_header(start: int, size: int) -> int:
    """Return the offset of the header that follows `size` bytes at `start`."""
    return start + (size + BLOCK - 1) // BLOCK * BLOCK


def header_name(header: bytes) -> str:
    """Return the name in a header; of a long name, stored before it, only the beginning. Raises tarfile.HeaderError."""
    return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
