"""Find the rows of Arrow files (Arrow columnar format, IPC streaming and file format) without reading the images.

Of each record batch only its metadata, the offsets of one binary column and the labels are read; pyarrow, which would map
the file and ask the kernel to read ahead, is used for the schema alone. Everything that a file says about places is
checked, so that a damaged file is an error and never a read outside of it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from src.data.packed import NO_BYTES, Damaged, OpenFile

FILE_MAGIC = b"ARROW1"
CONTINUATION = 0xFFFFFFFF
SCHEMA, DICTIONARY_BATCH, RECORD_BATCH = 1, 2, 3  # Message.fbs, MessageHeader
PAGE = 4096
MAX_METADATA = 1 << 26
"""Bytes of metadata of one message."""


class Message(NamedTuple):
    kind: int
    metadata: bytes
    header: int
    """Place of the header's table in `metadata`."""
    body: int
    """Place of the body in the file."""
    body_length: int
    start: int
    window: bytes
    """Bytes of the file from `start` on, which hold the metadata and perhaps more."""


@dataclass(frozen=True)
class Column:
    """Places of a column among the field nodes and buffers of a record batch."""

    kind: pa.DataType
    node: int
    buffer: int
    children: dict[str, "Column"]


@dataclass(frozen=True)
class FileRows:
    """Rows of one file. offsets (n,) int64; sizes (n,) uint32, `NO_BYTES` where null; labels (n,) int64 or None.

    paths: (batches, 4) int64: first row, place of the offsets of the path column, place of its text, bytes of an offset.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray | None
    paths: np.ndarray


def read_schema(path: Path) -> pa.Schema:
    """Read the schema of a stream or file. Raises Damaged."""
    file = OpenFile(path)
    try:
        first = next(_messages(file), None)
        if first is None or first.kind != SCHEMA:
            raise Damaged("no Arrow stream")
        prefix = struct.pack("<Ii", CONTINUATION, len(first.metadata))
        schema = pa.ipc.read_schema(pa.py_buffer(prefix + first.metadata))
        _columns(schema)
        return schema
    except (pa.ArrowException, struct.error, ValueError) as error:  # names that are no UTF-8 among them
        raise Damaged(str(error).splitlines()[0]) from error


def index_rows(path: Path, schema: pa.Schema, image: str, label: str | None) -> FileRows:
    """Find the rows of column `image`: binary, or a struct with `bytes` and perhaps `path`.

    Raises:
        Damaged: cut short, compressed, or with places that can't be.
        OSError: can't be read.
    """
    file = OpenFile(path)
    columns = _columns(schema)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    labels, paths, row = [], [], 0
    try:
        for message in _messages(file):
            if message.kind == SCHEMA and row == 0 and not parts:
                continue
            if message.kind == DICTIONARY_BATCH:
                continue
            if message.kind != RECORD_BATCH:
                raise Damaged(f"a message of kind {message.kind}")
            batch = _Batch(file, message)
            outer = columns[image]
            data = outer.children["bytes"] if outer.children else outer
            offsets, base = batch.offsets(data)
            sizes = np.diff(offsets)
            sizes = np.minimum(sizes, NO_BYTES - 1).astype(np.uint32)
            for column in {outer.node: outer, data.node: data}.values():
                sizes[batch.nulls(column)] = NO_BYTES
            parts.append((offsets[:-1] + base, sizes))
            if label is not None:
                labels.append(batch.whole_numbers(columns[label]))
            if outer.children and "path" in outer.children and batch.rows:
                place, text = batch.text(outer.children["path"])
                paths.append((row, place, text, 8 if _is_large(outer.children["path"].kind) else 4))
            row += batch.rows
    except (struct.error, ValueError, KeyError, IndexError) as error:
        raise Damaged(f"its record batches can't be read ({error})") from error
    none = np.empty(0, np.int64)
    return FileRows(
        np.concatenate([none, *(offsets for offsets, _ in parts)]),
        np.concatenate([np.empty(0, np.uint32), *(sizes for _, sizes in parts)]),
        np.concatenate([none, *labels]) if label is not None else None,
        np.array(paths, np.int64).reshape(-1, 4),
    )


def _messages(file: OpenFile) -> Iterator[Message]:
    """Yield the messages up to the end mark. Raises Damaged where it is missing."""
    size = file.size
    is_file_format = file.read(0, len(FILE_MAGIC)) == FILE_MAGIC
    at = 8 if is_file_format else 0
    if size < 8:
        raise Damaged("the file is empty" if not size else "no Arrow stream")
    while True:
        end = (at + PAGE // 2 + PAGE) // PAGE * PAGE  # the metadata, and mostly the offsets after it
        window = file.read(at, end - at)
        if len(window) < 4:
            raise Damaged("the end of the stream is missing")
        (length,), prefix = struct.unpack_from("<I", window), 4  # streams of Arrow before 0.15 begin with the length
        if length == CONTINUATION:
            if len(window) < 8:
                raise Damaged("the end of the stream is missing")
            (length,), prefix = struct.unpack_from("<I", window, 4), 8
        if length == 0:
            if not is_file_format and at + prefix != size:
                raise Damaged(f"its stream ends at byte {at + prefix:,}")
            if is_file_format and file.read(size - len(FILE_MAGIC), len(FILE_MAGIC)) != FILE_MAGIC:
                raise Damaged("the end of the file is missing")
            return
        if length > min(MAX_METADATA, size - at):
            raise Damaged("no Arrow stream" if at <= 8 else "it is cut within a message")
        if prefix + length > len(window):
            window = file.read(at, prefix + length)
        metadata = window[prefix : prefix + length]
        if len(metadata) < length:
            raise Damaged("it is cut within a message")
        try:
            root = _Table(metadata, struct.unpack_from("<I", metadata)[0])
            kind, body_length = root.number(1, "<B"), root.number(3, "<q")
            header = root.pointer(2)
        except (struct.error, ValueError) as error:
            raise Damaged("no Arrow stream" if at <= 8 else "a message that can't be read") from error
        body = at + prefix + length
        if not 0 <= body_length <= size - body:
            raise Damaged("it is cut within a record batch")
        yield Message(kind, metadata, header, body, body_length, at, window)
        at = body + body_length


class _Table:
    """A table of a flatbuffer."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self._vtable = at - _unpack("<i", data, at)
        self._size = _unpack("<H", data, self._vtable)

    def place(self, slot: int) -> int:
        """Return where a field lies, 0 where it is left out."""
        entry = 4 + 2 * slot
        shift = _unpack("<H", self.data, self._vtable + entry) if entry < self._size else 0
        return self.at + shift if shift else 0

    def number(self, slot: int, kind: str) -> int:
        place = self.place(slot)
        return _unpack(kind, self.data, place) if place else 0

    def pointer(self, slot: int) -> int:
        place = self.place(slot)
        return place + _unpack("<I", self.data, place) if place else 0

    def pairs(self, slot: int) -> np.ndarray:
        """Return a vector of structs of two int64."""
        at = self.pointer(slot)
        if not at:
            return np.empty((0, 2), np.int64)
        return np.frombuffer(self.data, "<i8", 2 * _unpack("<I", self.data, at), at + 4).reshape(-1, 2)


def _unpack(kind: str, data: bytes, at: int) -> int:
    if at < 0:
        raise ValueError("a place before the beginning")
    return int(struct.unpack_from(kind, data, at)[0])


class _Batch:
    """The parts of a record batch, each checked against the batch's body."""

    def __init__(self, file: OpenFile, message: Message) -> None:
        table = _Table(message.metadata, message.header)
        self.file, self.message, self.rows = file, message, table.number(0, "<q")
        self._nodes, self._buffers = table.pairs(1), table.pairs(2)
        if table.place(3):
            raise Damaged("its record batches are compressed", "Write it again without compression.")
        if self.rows < 0 or self.rows > 1 << 40:
            raise Damaged(f"a record batch of {self.rows} rows")

    def offsets(self, column: Column) -> tuple[np.ndarray, int]:
        """Return (rows + 1 offsets, int64; place in the file that they count from) of a binary or text column."""
        self._check_length(column)
        width = 8 if _is_large(column.kind) else 4
        if not self.rows:
            return np.zeros(1, np.int64), self.message.body
        raw = self._read(column.buffer + 1, (self.rows + 1) * width)
        offsets = np.frombuffer(raw, f"<i{width}").astype(np.int64)
        start, length = self._place(column.buffer + 2)
        if offsets[0] < 0 or offsets[-1] > length or np.any(offsets[1:] < offsets[:-1]):
            raise Damaged("a record batch has offsets that lie outside its data")
        return offsets, start

    def nulls(self, column: Column) -> np.ndarray:
        """Return the rows that are null, (k,) int64."""
        if not self._check_length(column) or not self.rows:
            return np.empty(0, np.int64)
        bits = np.frombuffer(self._read(column.buffer, (self.rows + 7) // 8), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, count=self.rows, bitorder="little") == 0)

    def whole_numbers(self, column: Column) -> np.ndarray:
        """Return an integer column as int64, -1 where null."""
        values = np.empty(0, np.int64)
        nulls = self.nulls(column)
        if self.rows:
            kind = np.dtype(column.kind.to_pandas_dtype()).newbyteorder("<")
            values = np.frombuffer(self._read(column.buffer + 1, self.rows * kind.itemsize), kind).astype(np.int64)
        values[nulls] = -1
        return values

    def text(self, column: Column) -> tuple[int, int]:
        """Return the places of offsets and of text."""
        self._check_length(column)
        width = 8 if _is_large(column.kind) else 4
        start, length = self._place(column.buffer + 1)
        if length < (self.rows + 1) * width:
            raise Damaged("a record batch with too few offsets")
        return start, self._place(column.buffer + 2)[0]

    def _check_length(self, column: Column) -> int:
        """Return the number of nulls."""
        length, nulls = (int(n) for n in self._nodes[column.node])
        if length != self.rows:
            raise Damaged(f"a record batch of {self.rows} rows with a column of {length}")
        return nulls

    def _place(self, number: int) -> tuple[int, int]:
        start, length = (int(n) for n in self._buffers[number])
        if start < 0 or length < 0 or start + length > self.message.body_length:
            raise Damaged("a record batch has a buffer outside its body")
        return self.message.body + start, length

    def _read(self, number: int, size: int) -> bytes:
        start, length = self._place(number)
        if size > length:
            raise Damaged("a record batch has a buffer that is too short")
        shift = start - self.message.start
        if shift + size <= len(self.message.window):
            return self.message.window[shift : shift + size]
        data = self.file.read(start, size)
        if len(data) < size:
            raise Damaged("it is cut within a record batch")
        return data


def _columns(schema: pa.Schema) -> dict[str, Column]:
    """Return the places of the columns: fields in depth-first order, as a record batch lists them."""
    counts = [0, 0]

    def walk(kind: pa.DataType) -> Column:
        if isinstance(kind, pa.BaseExtensionType):
            return walk(kind.storage_type)
        column = Column(kind, counts[0], counts[1], {})
        counts[0] += 1
        counts[1] += _buffer_count(kind)
        if not pa.types.is_dictionary(kind):
            for i in range(kind.num_fields):
                column.children[kind.field(i).name] = walk(kind.field(i).type)
        return column

    return {field.name: walk(field.type) for field in schema}


def _buffer_count(kind: pa.DataType) -> int:
    """Return how many buffers a type has, those of its children not counted (Arrow columnar format, buffer listing)."""
    types = pa.types
    if types.is_null(kind) or types.is_run_end_encoded(kind):
        return 0
    if types.is_struct(kind) or types.is_fixed_size_list(kind):
        return 1
    if types.is_union(kind):
        return 2 if kind.mode == "dense" else 1
    if types.is_binary(kind) or types.is_string(kind) or _is_large(kind) or types.is_list_view(kind):
        return 3
    if types.is_binary_view(kind) or types.is_string_view(kind):
        raise Damaged(f"a column of the type {kind}, which is not read here")
    return 2


def _is_large(kind: pa.DataType) -> bool:
    return pa.types.is_large_binary(kind) or pa.types.is_large_string(kind)
