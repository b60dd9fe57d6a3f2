"""Writing a Hugging Face dataset on disk: Arrow shards, then the two JSON files that make it loadable, last of all."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from src.core.files import replacing, write_text

ROWS_PER_BATCH = 100
UNKNOWN_LABEL = -1  # what `datasets.ClassLabel` takes for "no class"


class Row(NamedTuple):
    data: bytes
    path: str
    label: int


def features(class_names: Sequence[str] | None) -> dict[str, Any]:
    """The `features` of dataset_info.json: an image and, where there are classes, its label."""
    image = {"image": {"_type": "Image"}}
    return image | ({"label": {"names": list(class_names), "_type": "ClassLabel"}} if class_names else {})


def shard_name(index: int, count: int) -> str:
    return f"data-{index:05d}-of-{count:05d}.arrow"


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False))


def write_shard(path: Path, rows: Iterable[Row], class_names: Sequence[str] | None) -> int:
    """Write the rows as one Arrow stream; rows are taken one batch at a time. Returns how many there were."""
    kinds = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    kinds += [("label", pa.int64())] if class_names else []
    described = {"huggingface": json.dumps({"info": {"features": features(class_names)}})}
    schema = pa.schema(kinds, metadata=described)
    total = 0
    batch: list[Row] = []

    def flush() -> None:
        images = [{"bytes": row.data, "path": row.path} for row in batch]
        columns: dict[str, Any] = {"image": images}
        if class_names:
            columns["label"] = [row.label for row in batch]
        writer.write_table(pa.Table.from_pydict(columns, schema=schema))
        batch.clear()

    with replacing(path) as file, pa.ipc.new_stream(file, schema) as writer:
        for row in rows:
            batch.append(row)
            total += 1
            if len(batch) == ROWS_PER_BATCH:
                flush()
        if batch:
            flush()
    return total


def write_metadata(folder: Path, shards: Sequence[str], class_names: Sequence[str] | None, split: str | None) -> None:
    """Turn a folder of shards into a dataset: dataset_info.json, then state.json, without which nothing loads it."""
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
