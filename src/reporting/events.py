"""Scalars from the files that loggers leave: TensorBoard events and Lightning's metrics.csv.

TensorBoard's own loader says nothing of a file that breaks off, and computes checksums of every picture in pure Python
(minutes for a long run). The framing of a record is four fields, so it is read here: a little-endian uint64 length, the
masked CRC-32C of the length, the serialized Event, its masked CRC-32C (TensorFlow, `core/lib/io/record_writer.h`).
"""

import csv
import math
import struct
from collections.abc import Iterator
from pathlib import Path

from src.reporting.series import Point

_HEAD = struct.Struct("<QI")
_CHECKED_BYTES = 4096  # records of scalars are far smaller; pictures are not worth their checksum here
_NOT_FIGURES = {"step", "epoch", "hp_metric"}

Scalars = dict[str, list[Point]]


def read_events(path: Path) -> tuple[Scalars, float | None, str | None]:
    """Scalars by logged name, the time of the last record (seconds since 1970), and what is wrong with the file."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    scalars: Scalars = {}
    last: float | None = None
    try:
        for record in _records(path):
            event = Event.FromString(record)
            last = event.wall_time if last is None else max(last, event.wall_time)
            for value in event.summary.value:
                number = _number(value)
                if number is not None and value.tag not in _NOT_FIGURES:
                    scalars.setdefault(value.tag, []).append((int(event.step), number))
    except (_BrokenRecordError, DecodeError, OSError) as error:
        return scalars, last, f"{path.name} is readable only in part: {error}. What comes after that place is missing."
    return scalars, last, None


def read_csv(path: Path) -> tuple[Scalars, str | None]:
    """Scalars by logged name, and what is wrong with the file."""
    scalars: Scalars = {}
    broken = 0
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(line.replace("\0", "") for line in file):
                if not _is_number(step := row.get("step")):
                    broken += 1
                    continue
                for name, text in row.items():
                    if name and isinstance(text, str) and text and name not in _NOT_FIGURES:
                        if _is_number(text, finite=False):
                            scalars.setdefault(name, []).append((int(float(step or 0)), float(text)))
                        else:
                            broken += 1
    except (OSError, csv.Error) as error:
        return scalars, f"{path.name} is readable only in part: {error}."
    return scalars, f"{path.name}: {broken} entries are no numbers and were left out." if broken else None


class _BrokenRecordError(Exception):
    pass


def _records(path: Path) -> Iterator[bytes]:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    size = path.stat().st_size
    with path.open("rb") as file:
        while head := file.read(_HEAD.size):
            place = file.tell() - len(head)
            if len(head) < _HEAD.size:
                raise _BrokenRecordError(f"it breaks off at byte {place:,}")
            length, check = _HEAD.unpack(head)
            if masked_crc32c(head[:8]) != check:
                raise _BrokenRecordError(f"the record at byte {place:,} of {size:,} is damaged")
            if place + _HEAD.size + length + 4 > size:
                raise _BrokenRecordError(f"it breaks off in the record at byte {place:,}")
            content, tail = file.read(length), file.read(4)
            if length <= _CHECKED_BYTES and masked_crc32c(content) != int.from_bytes(tail, "little"):
                raise _BrokenRecordError(f"the record at byte {place:,} of {size:,} is damaged")
            yield content


def _number(value: object) -> float | None:
    """Of a summary value: `simple_value`, or a tensor with one number (what newer writers leave)."""
    kind = value.WhichOneof("value")  # type: ignore[attr-defined]
    if kind == "simple_value":
        return float(value.simple_value)  # type: ignore[attr-defined]
    if kind == "tensor":
        tensor = value.tensor  # type: ignore[attr-defined]
        if not tensor.tensor_shape.dim and len(tensor.float_val) == 1:
            return float(tensor.float_val[0])
    return None


def _is_number(text: str | None, finite: bool = True) -> bool:
    try:
        number = float(text or "")
    except ValueError:
        return False
    return math.isfinite(number) or not finite
