"""Find the images of tar files (USTAR, GNU and PAX, POSIX.1-2017 pax) by reading headers and labels alone.

A sample is what shares a name up to the first dot and lies together, as WebDataset writes it. Its first image member
counts: `0001.jpg`, not `0001.mask.png`. Hidden members and all that is no regular file are left out.
"""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from src.core.errors import UserError
from src.data.packed import NO_BYTES, Damaged, Readable
from src.data.sources import SUFFIXES

BLOCK = 512
PAGE = 4096
HEADER_BYTES = 2 * PAGE
"""Read for a header, with what follows."""
NO_LABEL, ODD_LABEL = -1, -2
"""Of a sample without a label, and of one whose label is no whole number from 0 on."""
NO_SPARSE = "Write the tar again without --sparse."
MAX_SMALL = 1 << 20
"""Largest size of a member that is read whole (names, labels), bytes."""
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd --rm"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
}
_IMAGES = frozenset(suffix[1:] for suffix in SUFFIXES)
_USED = re.compile(rb"path=|size=|GNU\.sparse")
"""In PAX records; times and owners are not parsed."""
_REGULAR, _CONTINUED = (b"0", b"\0", b"7"), (b"L", b"K")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    size: int


@dataclass
class TarRows:
    """The samples with an image of one tar, by their place."""

    offsets: np.ndarray
    """(n,) int64, bytes."""
    sizes: np.ndarray
    """(n,) uint32, bytes."""
    labels: np.ndarray
    """(n,) int32."""
    without_image: int = 0
    """Samples without an image member."""
    examples: list[str] = field(default_factory=list)
    """Names of some of them."""


def check_label(label: str | None) -> None:
    """Raise UserError unless `label` is one that tars can have: None, `cls` or `json:KEY`."""
    if label not in (None, "cls") and not (label.startswith("json:") and label != "json:"):
        raise UserError(
            f"data.label={label}: of tars expected null, cls, or json:KEY (the key of the .json beside an image)."
        )


def index_tar(file: Readable, label: str | None = None, at_once: int = HEADER_BYTES) -> TarRows:
    """Find the samples of a tar. label: None or `cls` for the member `.cls`, `json:KEY` for a key of the member `.json`;
    at_once: bytes to read for a header, with what follows.

    Raises:
        Damaged: cut short, compressed, or no tar.
    """
    extension, _, key = ("cls", "", "") if label is None else label.partition(":")
    window = _Window(file, at_once)
    offsets, sizes, labels = [], [], []
    without, examples = 0, []
    current, image, number = None, None, NO_LABEL

    def close() -> None:
        nonlocal without
        if image is not None:
            offsets.append(image.offset)
            sizes.append(min(image.size, NO_BYTES - 1))
            labels.append(number)
        elif current is not None:
            without += 1
            if len(examples) < 3:
                examples.append(current)

    for member in members(window):
        name = member.name
        if name.startswith("./"):
            name = name[2:]
        if name.startswith(".") or "/." in name:
            continue
        base = name.rfind("/") + 1
        dot = name.find(".", base)
        sample, kind = (name, "") if dot < 0 else (name[:dot], name[dot + 1 :].lower())
        if sample != current:
            close()
            current, image, number = sample, None, NO_LABEL
        if kind in _IMAGES:
            image = image or member
        elif kind == extension:
            number = _label(window.take(member.offset, min(member.size, MAX_SMALL)), key)
    close()
    return TarRows(
        np.array(offsets, np.int64), np.array(sizes, np.uint32), np.array(labels, np.int32), without, examples
    )


def _label(data: bytes, key: str) -> int:
    try:
        value = json.loads(data)[key] if key else int(data)
    except (ValueError, KeyError, TypeError, RecursionError):
        return ODD_LABEL
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else ODD_LABEL


class _Window:
    """Reads short ranges; those within `at_once` bytes cost one read."""

    def __init__(self, file: Readable, at_once: int) -> None:
        self.file, self.size, self.at_once = file, file.size, at_once
        self._data, self._start = b"", 0

    def take(self, at: int, count: int) -> bytes:
        shift = at - self._start
        if not 0 <= shift <= len(self._data) - count:
            self._data, self._start, shift = self.file.read(at, max(count, self.at_once - at % PAGE)), at, 0
        return self._data[shift : shift + count]


def members(file: "_Window | Readable") -> Iterator[Member]:
    """Yield the regular files of a tar in their order. Raises Damaged."""
    window = file if isinstance(file, _Window) else _Window(file, HEADER_BYTES)
    at, size = 0, window.size
    everywhere: dict[str, str] = {}  # PAX records of all members
    own: dict[str, str] = {}  # of the next one
    if not size:
        raise Damaged("the file is empty")
    while True:
        header = window.take(at, BLOCK)
        if len(header) < BLOCK:
            raise Damaged(f"it is cut short: no end mark at byte {at:,}")
        if not header[0] and not any(header):
            return
        check_header(header, at)
        kind, length = header[156:157], _number(header[124:136], at)
        at += BLOCK
        end = at + (length + BLOCK - 1) // BLOCK * BLOCK
        if kind in _REGULAR:
            records = everywhere | own if everywhere or own else None
            if records and "size" in records:
                length = _number(records["size"].encode("utf-8", "surrogateescape"), at, base=10)
                end = at + (length + BLOCK - 1) // BLOCK * BLOCK
            name = records["path"] if records and "path" in records else header_name(header)
            if records and any(record.startswith("GNU.sparse") for record in records):
                raise Damaged(f"its member {name} is sparse", NO_SPARSE)
            if at + length > size:
                raise Damaged(f"it is cut short within {name}")
            own = {}
            if not name.endswith("/"):
                yield Member(name, at, length)
        elif kind in (b"x", b"g", b"X", *_CONTINUED):
            data = window.take(at, length) if length <= MAX_SMALL else b""
            if len(data) < length:
                raise Damaged(f"it is cut short or damaged at byte {at:,}")
            if kind == b"L":
                own["path"] = _text(data)
            elif kind != b"K" and _USED.search(data):
                records = _records(data, at)
                everywhere, own = (everywhere | records, own) if kind == b"g" else (everywhere, own | records)
        elif kind == b"S":
            raise Damaged(f"its member {header_name(header)} is sparse", NO_SPARSE)
        else:
            own = {}
            if kind in _WITHOUT_DATA:
                end = at
        at = end


def check_header(header: bytes, at: int) -> None:
    """Raise Damaged where the checksum of a header is another."""
    for packed, (first, tools) in COMPRESSED.items() if at == 0 else ():
        if header.startswith(packed):
            raise Damaged(
                f"it is compressed with {first}, so its members can't be read singly", f"Unpack it: `{tools} FILE`."
            )
    try:
        noted = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        noted = -1
    # The sum of all bytes but these, which count as blanks. Adler-32 begins with 1 + the sum, modulo 65521.
    if zlib.adler32(header) & 0xFFFF != (noted - 255 + sum(header[148:156])) % 65521:
        signed = sum(b - 256 if b > 127 else b for b in header[:148] + header[156:]) + 256  # as some old programs count
        if noted != signed:
            raise Damaged(f"no tar header at byte {at:,}")


def _number(digits: bytes, at: int, base: int = 8) -> int:
    """Parse a number: in digits, or base 256 where the first bit is set (GNU)."""
    if digits[:1] >= b"\x80":
        value = int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else -1
    else:
        try:
            value = int(digits.split(b"\0", 1)[0].strip() or b"0", base)
        except ValueError:
            value = -1
    if not 0 <= value < 1 << 62:
        raise Damaged(f"a member of an impossible size at byte {at:,}")
    return value


def header_name(header: bytes) -> str:
    """Return the name in a header; of a long one, which stands before it, the beginning."""
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _records(data: bytes, at: int) -> dict[str, str]:
    """Parse PAX records, `LENGTH KEY=VALUE\\n` each."""
    found, start = {}, 0
    while start < len(data) and data[start]:
        digits, _, _ = data[start : start + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = data[start + len(digits) + 1 : start + length]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) + 1 or start + length > len(data) or not equals or not value.endswith(b"\n"):
            raise Damaged(f"a PAX header at byte {at:,} can't be read")
        found[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        start += length
    return found
