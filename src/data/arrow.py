"""Read one Hugging Face dataset on disk (`state.json`, `dataset_info.json`, Arrow files), mapped with pyarrow alone.

The `datasets` library is not used: its import takes longer than opening ImageNet.
"""

import bisect
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from src.core.errors import UserError
from src.data.arrow_writer import UNKNOWN_LABEL
from src.data.decode import BadImage
from src.data.sources import read_file

# The last 8 bytes of a complete Arrow stream: continuation marker and a length of 0 (Arrow columnar format, IPC
# streaming).
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class ArrowSource:
    """Rows of `image` (a struct of bytes and path) and, where there is one, `label`.

    The image column is the one called `image`, else the only one of the type Image. Pickles as its path: a worker maps
    the files itself.

    Raises:
        UserError: half-written, cut short, empty, or without an image column.
    """

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder, self._label = folder, label
        self._state = read_json(self.folder / "state.json")
        info = read_json(self.folder / "dataset_info.json")
        self._shards = [self.folder / f["filename"] for f in self._state.get("_data_files", [])]
        table = _read(self.folder, self._shards)
        features = info.get("features") or {}
        column = _image_column(self.folder, features, table.column_names)
        self._chunks = _image_chunks(self.folder, table.column(column), column)
        self._starts = [0]
        for data, _ in self._chunks:
            self._starts.append(self._starts[-1] + len(data))
        if not len(self):
            raise UserError(f"{self.folder} (data.data_dir) is a dataset of 0 images.")
        self._labels, self.class_names = _labels(folder, table, features, label)
        self.num_classes = None
        if self._labels is not None:
            self.num_classes = max(len(self.class_names or ()), int(self._labels.max(initial=-1)) + 1)

    def __len__(self) -> int:
        return self._starts[-1]

    def encoded(self, index: int) -> memoryview:
        """Return a view into the mapped file; a row that has only a path is read from there."""
        chunk, row = self._locate(index)
        data, paths = self._chunks[chunk]
        if data[row].is_valid:
            return memoryview(data[row].as_buffer())
        path = paths[row].as_py() if paths is not None else None
        if not path:
            raise BadImage("neither bytes nor a path in its row")
        return memoryview(read_file(self.folder / path))

    def label(self, index: int) -> int | None:
        return int(self._labels[index]) if self._labels is not None else None

    def name(self, index: int) -> str:
        chunk, row = self._locate(index)
        paths = self._chunks[chunk][1]
        path = paths[row].as_py() if paths is not None else None
        return f"row {index} of {self.folder}" + (f" ({path})" if path else "")

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self._state.get("_fingerprint")).encode())
        for shard in self._shards:
            digest.update(f"{shard.name}:{shard.stat().st_size}\0".encode())
        return digest.hexdigest()[:16]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        chunk = bisect.bisect_right(self._starts, index) - 1
        return chunk, index - self._starts[chunk]

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowSource, (self.folder, self._label)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a dataset. Raises UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} has no {path.name}: the dataset was half-written or half-copied. Copy it again, or convert it "
            "again into another folder with `python scripts/create_hf_test_data.py --input_dir IMAGES --output_dir "
            f"{path.parent}_new`."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): the dataset was half-written or half-copied.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: it belongs to no dataset.")
    return value


def _read(folder: Path, shards: list[Path]) -> pa.Table:
    if not shards:
        raise UserError(f"{folder / 'state.json'} lists no Arrow files: the dataset is empty.")
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of its {len(shards)} Arrow files: {', '.join(missing[:5])}"
            f"{' …' if len(missing) > 5 else ''}. Copy them again."
        )
    try:
        return pa.concat_tables([_map(shard) for shard in shards])
    except pa.ArrowInvalid as error:
        raise UserError(f"The Arrow files of {folder} don't belong together: {error}") from error


def _map(shard: Path) -> pa.Table:
    size = shard.stat().st_size
    try:
        if size < len(END_OF_STREAM):
            raise pa.ArrowInvalid("the file is empty" if not size else "no Arrow stream")
        mapped = pa.memory_map(str(shard))
        table = pa.ipc.open_stream(mapped).read_all()
        mapped.seek(size - len(END_OF_STREAM))
        if mapped.read() != END_OF_STREAM:
            raise pa.ArrowInvalid("the end of the stream is missing")
        return table
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{shard} ({size:,} bytes) is cut short or damaged: {str(error).splitlines()[0]}. Copy it again, or "
            "convert the dataset again."
        ) from error


def _image_column(folder: Path, features: dict[str, Any], columns: list[str]) -> str:
    images = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Image" and n in columns]
    if "image" in columns and (not images or "image" in images):
        return "image"
    if len(images) == 1:
        return images[0]
    raise UserError(
        f"{folder} has {'no' if not images else 'more than one'} image column; expected one called `image` of the type "
        f"Image. Its columns: {', '.join(columns) or 'none'}."
    )


def _labels(
    folder: Path, table: pa.Table, features: dict[str, Any], wanted: str | None
) -> tuple[np.ndarray | None, list[str] | None]:
    """Return the labels, int64, -1 where a row has none, and the names of the classes where there are some. A column that
    nobody asked for and that holds no whole numbers is none of labels."""
    name = wanted or "label"
    kind = table.schema.field(name).type if name in table.column_names else None
    if kind is None or not pa.types.is_integer(kind):
        if wanted is None:
            return None, None
        whole = [field.name for field in table.schema if pa.types.is_integer(field.type)]
        raise UserError(
            f"data.label={wanted}: {folder} has {f'{kind} in that column' if kind else 'no such column'}; expected whole "
            f"numbers. Its columns of these: {', '.join(whole) or 'none'}. Text becomes classes with "
            f"`datasets.load_from_disk({str(folder)!r}).class_encode_column(...)`; null takes the labels that are there."
        )
    filled = pc.fill_null(table.column(name).cast(pa.int64()), UNKNOWN_LABEL)
    return filled.to_numpy(), (features.get(name) or {}).get("names")


def _image_chunks(folder: Path, column: pa.ChunkedArray, name: str) -> list[tuple[pa.Array, pa.Array | None]]:
    """Return (bytes, path) of each record batch."""
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [(chunk, None) for chunk in column.chunks]
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        at, path_at = kind.get_field_index("bytes"), kind.get_field_index("path")
        fields = [chunk.flatten() for chunk in column.chunks]  # a missing row has missing fields; no bytes are copied
        return [(f[at], f[path_at] if path_at >= 0 else None) for f in fields]
    raise UserError(
        f"The column {name!r} of {folder} holds {kind}; expected encoded images (the type datasets.Image, a struct of "
        "bytes and path)."
    )
