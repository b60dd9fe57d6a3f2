"""Index the rows of Arrow files (IPC streaming and file format) without reading the images.

pyarrow decodes record batches over a memory map and touches only their metadata; image offsets are computed from the
addresses of its buffers. The map has no read-ahead (`pyarrow.memory_map` prefetches whole batches) and is closed after
indexing. Offsets that pyarrow does not validate are checked here, so that a damaged file raises an error and is never read
out of bounds.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from src.core.errors import UserError
from src.data.packed import NO_BYTES, Damaged, FileRows

FILE_MAGIC = b"ARROW1"
STREAM_START = 8
"""Offset of the stream in the file format, bytes."""


@dataclass(frozen=True)
class ArrowRows(FileRows):
    """Rows of one file.

    paths: (batches, 4) int64: first row, file position of the path column's offsets and of its text, bytes per offset.
    """

    paths: np.ndarray


def read_schema(path: Path) -> pa.Schema:
    """Read the schema of a stream or file. Raises UserError if it is damaged."""
    with _open_reader(path) as (*_, reader):
        if len(set(reader.schema.names)) != max(1, len(reader.schema)):  # decodes the names, too
            raise Damaged("it has no columns, or two with the same name")
        return reader.schema


def index_rows(path: Path, schema: pa.Schema, image: str, label: str | None) -> ArrowRows:
    """Index the rows of column `image`: binary, or a struct with `bytes` and optionally `path`.

    Raises:
        UserError: another schema, truncated, compressed, or invalid offsets.
    """
    offsets, sizes = [np.empty(0, np.int64)], [np.empty(0, np.uint32)]
    labels, paths, row = [np.empty(0, np.int64)], [], 0
    with _open_reader(path) as (descriptor, whole, stream, reader):
        if not reader.schema.equals(schema):
            raise UserError(
                f"The Arrow files of {path.parent} don't belong together: {path.name} has the columns {listed(reader.schema)}, "
                f"the first one {listed(schema)}."
            )
        for batch in _batches(descriptor, whole, stream, reader):
            outer = batch.column(image)
            is_struct = pa.types.is_struct(outer.type)
            data = outer.field("bytes") if is_struct else outer
            starts, base = _offsets_and_base(whole, data)
            lengths = np.minimum(np.diff(starts), NO_BYTES - 1).astype(np.uint32)
            for column in (outer, data):
                lengths[_nulls(column)] = NO_BYTES
            offsets.append(starts[:-1] + base)
            sizes.append(lengths)
            if label is not None:
                labels.append(_integers(batch.column(label)))
            if is_struct and outer.type.get_field_index("path") >= 0 and len(batch):
                text = outer.field("path")
                places, start = (_file_position(whole, buffer) for buffer in text.buffers()[1:])
                paths.append((row, places, start, 8 if pa.types.is_large_string(text.type) else 4))
            row += len(batch)
    found = np.concatenate(labels) if label is not None else None
    return ArrowRows(np.concatenate(offsets), np.concatenate(sizes), found, np.array(paths, np.int64).reshape(-1, 4))


def listed(schema: pa.Schema) -> str:
    """Return the column names and types as text, for messages."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"


@contextmanager
def _open_reader(path: Path) -> Iterator[tuple[int, pa.Buffer, pa.BufferReader, Any]]:
    """Yield the file descriptor, the mapped file, the stream in it, and its pyarrow reader. Read errors become a UserError."""
    try:
        with open(path, "rb") as file:
            if not file.seek(0, 2):
                raise Damaged("the file is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_RANDOM)
            whole = pa.py_buffer(mapped)
            is_file = mapped[: len(FILE_MAGIC)] == FILE_MAGIC
            if is_file and mapped[-len(FILE_MAGIC) :] != FILE_MAGIC:
                raise Damaged("the end of the file is missing")
            stream = pa.BufferReader(whole.slice(STREAM_START) if is_file else whole)
            yield file.fileno(), whole, stream, pa.ipc.open_stream(stream)
    except (Damaged, pa.ArrowException, ValueError, KeyError, OSError) as error:  # also names that aren't UTF-8
        lines = str(error).splitlines() or [type(error).__name__]
        text = error if isinstance(error, Damaged) else Damaged(lines[0].rstrip("."))
        size = f" ({path.stat().st_size:,} bytes)" if path.is_file() else ""
        raise UserError(f"{path}{size} is cut short or damaged: {text}") from error


def _batches(descriptor: int, whole: pa.Buffer, stream: pa.BufferReader, reader: Any) -> Iterator[pa.RecordBatch]:
    """Yield the record batches up to the end-of-stream marker. Raises Damaged if it is missing."""
    while True:
        before = stream.tell()
        if hasattr(os, "posix_fadvise"):  # prefetch the next batch's metadata in one read
            os.posix_fadvise(descriptor, before, 2 * mmap.PAGESIZE, os.POSIX_FADV_WILLNEED)
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            break
        batch.validate()
        yield batch
    if stream.tell() == before:
        raise Damaged("the end of the stream is missing")
    if stream.size() == whole.size and stream.tell() != whole.size:
        raise Damaged(f"its stream ends at byte {stream.tell():,}")


def _offsets_and_base(whole: pa.Buffer, column: pa.Array) -> tuple[np.ndarray, int]:
    """Return (rows + 1 offsets, int64; the file position they are relative to) of a binary column."""
    _, offsets, data = column.buffers()
    if not len(column):
        return np.zeros(1, np.int64), 0
    kind = np.dtype("<i8" if pa.types.is_large_binary(column.type) else "<i4")
    starts = np.frombuffer(offsets, kind, len(column) + 1).astype(np.int64)
    size = data.size if data is not None else 0
    if starts[0] < 0 or starts[-1] > size or np.any(starts[1:] < starts[:-1]):
        raise Damaged("a record batch has offsets that lie outside its data")
    return starts, _file_position(whole, data) if size else 0


def _integers(column: pa.Array) -> np.ndarray:
    """Return an integer column as int64, -1 where null. Avoids `to_numpy`, whose first call imports pandas."""
    if not len(column):
        return np.empty(0, np.int64)
    values = np.frombuffer(column.buffers()[1], np.dtype(str(column.type)), len(column)).astype(np.int64)
    values[_nulls(column)] = -1
    return values


def _nulls(column: pa.Array) -> Any:
    """Return a numpy index that selects the null rows of a column."""
    return column.is_null().to_numpy(zero_copy_only=False) if column.null_count else slice(0)


def _file_position(whole: pa.Buffer, buffer: pa.Buffer | None) -> int:
    """Return the file position of a buffer. Raises Damaged if it is a copy, as for compressed batches."""
    place = buffer.address - whole.address if buffer is not None else 0
    if buffer is not None and buffer.size and not 0 <= place <= whole.size - buffer.size:
        raise Damaged("its record batches are compressed", "Write it again without compression.")
    return max(place, 0)
