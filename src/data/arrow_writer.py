"""Write a Hugging Face dataset on disk: Arrow shards, then the two JSON files that make it loadable."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import islice
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
    """Return the `features` of dataset_info.json: an image and its label.

    class_names: None where there are no labels; empty where they are numbers without names.
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
    """Write the rows as one Arrow stream, taking one record batch of them at a time; return how many there were."""
    kinds = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    kinds += [("label", pa.int64())] if class_names is not None else []
    schema = pa.schema(kinds, metadata={"huggingface": json.dumps({"info": {"features": features(class_names)}})})
    total, remaining = 0, iter(rows)
    with replacing(path) as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(islice(remaining, ROWS_PER_BATCH)):
            columns = {
                "image": [{"bytes": row.data, "path": row.path} for row in batch],
                "label": [r.label for r in batch],
            }
            writer.write_table(pa.Table.from_pydict(columns, schema=schema))
            total += len(batch)
    return total


def write_metadata(folder: Path, shards: Sequence[str], class_names: Sequence[str] | None, split: str | None) -> None:
    """Make a folder of shards a dataset: write dataset_info.json, then state.json, without which nothing loads it."""
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
