"""Write a Hugging Face dataset on disk: Arrow shards, then the two JSON files that make it loadable."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from src.core.files import replacing, write_text

ROWS_PER_BATCH = 100
BATCH_BYTES = 1 << 30
"""Size that ends a record batch of large images; 32-bit offsets hold at most 2 GiB."""
IMAGE = [pa.field("bytes", pa.binary()), pa.field("path", pa.string())]
UNKNOWN_LABEL = -1  # "no class" in `datasets.ClassLabel`


class Row(NamedTuple):
    data: bytes
    path: str
    label: int


def features(class_names: Sequence[str] | None) -> dict[str, Any]:
    """Return the `features` of dataset_info.json: an image and its label.

    class_names: None if there are no labels; empty if they are numbers without names.
    """
    image: dict[str, Any] = {"image": {"_type": "Image"}}
    if class_names is None:
        return image
    label = {"names": list(class_names), "_type": "ClassLabel"} if class_names else {"dtype": "int64", "_type": "Value"}
    return image | {"label": label}


def shard_name(index: int, count: int) -> str:
    return f"data-{index:05d}-of-{count:05d}.arrow"


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False))


def write_shard(path: Path, rows: Iterable[Row], class_names: Sequence[str] | None) -> int:
    """Write the rows as one Arrow stream, one record batch in memory at a time; return the row count."""
    kinds = [("image", pa.struct(IMAGE))]
    kinds += [("label", pa.int64())] if class_names is not None else []
    schema = pa.schema(kinds, metadata={"huggingface": json.dumps({"info": {"features": features(class_names)}})})
    total = 0
    with replacing(path) as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _batches(rows):
            data, paths, labels = zip(*batch, strict=True)
            names = [path.encode() for path in paths]
            columns: list[Any] = [
                pa.StructArray.from_arrays([_array(data, IMAGE[0]), _array(names, IMAGE[1])], fields=IMAGE)
            ]
            if class_names is not None:
                columns.append(
                    pa.Array.from_buffers(pa.int64(), len(batch), [None, pa.py_buffer(np.array(labels, np.int64))])
                )
            writer.write_batch(pa.record_batch(columns, schema=schema))
            total += len(batch)
    return total


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.data)
        if len(batch) == ROWS_PER_BATCH or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _array(values: Sequence[bytes], field: pa.Field) -> pa.Array:
    """Build a binary or string array with 32-bit offsets. `pa.array` imports pandas and copies several times."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    data = pa.allocate_buffer(int(offsets[-1]))  # from Arrow's pool, which reuses pages between batches
    view = memoryview(data).cast("B")
    for start, value in zip(offsets.tolist(), values, strict=False):
        view[start : start + len(value)] = value
    return pa.Array.from_buffers(field.type, len(values), [None, pa.py_buffer(offsets), data])


def write_metadata(folder: Path, shards: Sequence[str], class_names: Sequence[str] | None, split: str | None) -> None:
    """Turn a folder of shards into a dataset: write dataset_info.json, then state.json, without which it can't be loaded."""
    digest = hashlib.sha256()
    for name in shards:
        digest.update(f"{name}:{(folder / name).stat().st_size}\0".encode())
    info = {"citation": "", "description": "", "features": features(class_names), "homepage": "", "license": ""}
    write_json(folder / "dataset_info.json", info)
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": digest.hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    write_json(folder / "state.json", state)
