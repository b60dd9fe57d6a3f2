"""Open Hugging Face datasets on disk (`state.json`, `dataset_info.json`, Arrow files) and read their images by file offset.

The `datasets` library is not used: its import takes longer than opening ImageNet.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from src.core.errors import UserError
from src.core.json_files import read_json
from src.data.arrow_index import index_rows, listed, read_schema
from src.data.decode import BadImage
from src.data.packed import PackedIndex, PackedSource
from src.data.sources import DEFAULT_OPTIONS, ReadOptions, read_file, short_digest

COPY_AGAIN = (
    "It was half-written or half-copied. Copy it again, or convert the images again into another folder with "
    "`python scripts/create_hf_test_data.py`."
)


class ArrowSource(PackedSource):
    """Images in the Arrow files of one folder. Pickles as its constructor arguments, so each process opens the files itself.

    files: names in `folder`; None: those listed in its state.json.

    Raises:
        UserError: incomplete, damaged, empty, or without the requested columns.
    """

    def __init__(
        self, folder: Path, columns: ReadOptions = DEFAULT_OPTIONS, files: Sequence[str] | None = None
    ) -> None:
        self._arguments = folder, columns, files
        self.folder = folder
        info, self._state = _metadata(folder, files)
        names = [entry["filename"] for entry in self._state["_data_files"]]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"{folder} lacks {len(missing)} of its {len(names)} Arrow files: {', '.join(missing[:5])}"
                f"{' …' if len(missing) > 5 else ''}. Copy them again."
            )
        paths = [folder / name for name in names]
        schema = read_schema(paths[0])
        features = info.get("features") or schema_features(schema)
        features = features if isinstance(features, dict) else {}
        image = _image_column(folder, features, schema, columns.image)
        label = _label_column(folder, schema, columns.label)
        rows = [index_rows(path, schema, image, label) for path in paths]
        self._paths = [part.paths for part in rows]
        index = PackedIndex.of_files(rows)
        if not index.starts[-1]:
            raise UserError(f"{folder} (data.data_dir) is a dataset of 0 images.")
        super().__init__(paths, index, class_names(features, label))

    def name(self, index: int) -> str:
        path = self._path(index)
        return f"row {index} of {self.folder}" + (f" ({path})" if path else "")

    def fingerprint(self) -> str:
        sizes = "".join(f"{file.name}:{file.stat().st_size}\0" for file in self.files)
        return short_digest((str(self._state.get("_fingerprint")) + sizes).encode())

    def _read_external(self, index: int) -> bytes:
        path = self._path(index)
        if not path:
            raise BadImage("neither bytes nor a path in its row")
        return read_file(self.folder / path)

    def _path(self, index: int) -> str | None:
        """Read the row's `path`; None if it has none or it can't be read."""
        number = self.file_of(index)
        batches, row = self._paths[number], index - self._starts[number]
        if not len(batches):
            return None
        first, offsets, text, width = (int(n) for n in batches[np.searchsorted(batches[:, 0], row, "right") - 1])
        try:
            places = self.read(number, offsets + (row - first) * width, 2 * width)
            start, stop = np.frombuffer(places, f"<i{width}").tolist()
            return self.read(number, text + start, stop - start).decode("utf-8", "replace") or None
        except (BadImage, ValueError):
            return None


def _metadata(folder: Path, files: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of dataset_info.json and state.json; for named `files`, a substitute for state.json."""
    if files is not None:
        info = read_json(folder / "dataset_info.json", COPY_AGAIN) if (folder / "dataset_info.json").is_file() else {}
        return info, {"_data_files": [{"filename": name} for name in files]}
    state = read_json(folder / "state.json", COPY_AGAIN, _data_files=list[dict[str, Any]])
    info = read_json(folder / "dataset_info.json", COPY_AGAIN)
    entries = state["_data_files"]
    for entry in entries:
        name = entry.get("filename")
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{folder / 'state.json'}: `_data_files` lists {entry!r:.80}; expected {{'filename': a file in that folder}}. "
                + COPY_AGAIN
            )
    if not entries:
        raise UserError(f"{folder / 'state.json'} lists no Arrow files: the dataset is empty.")
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} is a selection of rows. Write them out with " + _rewrite(folder, "flatten_indices()", "flat")
        )
    return info, state


def schema_features(schema: pa.Schema) -> dict[str, Any]:
    """Return the features that `datasets` stored in the schema metadata; empty if there are none."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}


def class_names(features: dict[str, Any], label: str | None) -> list[str] | None:
    """Return the class names of column `label` from its `datasets` features; None if it has none."""
    feature = features.get(label or "")
    names = feature.get("names") if isinstance(feature, dict) else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def image_columns(features: dict[str, Any], schema: pa.Schema) -> list[str]:
    """Return the names of the image columns: those whose feature is `Image`, else those of a type that can hold images."""
    marked = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Image" and n in schema.names]
    return marked or [field.name for field in schema if holds_images(field.type)]


def holds_images(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold encoded images: bytes, or a struct of `bytes` and optionally `path`."""
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_binary(kind.field(at).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(folder: Path, features: dict[str, Any], schema: pa.Schema, wanted: str | None) -> str:
    images = image_columns(features, schema)
    if wanted is not None and wanted not in schema.names:
        raise UserError(f"data.image_column={wanted}: {folder} has no such column. Its columns: {listed(schema)}.")
    name = wanted or ("image" if "image" in schema.names and (not images or "image" in images) else None)
    if name is None and len(images) == 1:
        name = images[0]
    if name is None and images:
        raise UserError(
            f"{folder} has more than one image column ({', '.join(images)}). Choose one: data.image_column={images[0]}."
        )
    if name is None:
        raise UserError(
            f"{folder} has no image column. Its columns: {listed(schema)}. If one of them names or holds images, cast it: "
            + _rewrite(folder, "cast_column('COLUMN', datasets.Image())", "images")
        )
    kind = schema.field(name).type
    if not holds_images(kind):
        raise UserError(
            f"The column {name!r} of {folder} holds {kind}; expected encoded images (the type datasets.Image, a struct of "
            "bytes and path). If it names files, make it a column of images: "
            + _rewrite(folder, f"cast_column({name!r}, datasets.Image())", "images")
        )
    return name


def _label_column(folder: Path, schema: pa.Schema, wanted: str | None) -> str | None:
    """Return the label column: `wanted`, else `label` if it holds integers, else None. UserError: `wanted` holds none."""
    name = wanted or "label"
    kind = schema.field(name).type if name in schema.names else None
    if kind is not None and pa.types.is_integer(kind):
        return name
    if wanted is None:
        return None
    whole = [field.name for field in schema if pa.types.is_integer(field.type)]
    raise UserError(
        f"data.label={wanted}: {folder} has {f'{kind} in that column' if kind else 'no such column'}; expected whole "
        f"numbers. Its integer columns: {', '.join(whole) or 'none'}. Turn text into classes with "
        + _rewrite(folder, f"class_encode_column({wanted!r})", "classes")
    )


def _rewrite(folder: Path, change: str, ending: str) -> str:
    """Return the command that writes a changed copy of a dataset, and the setting that selects the copy."""
    target = f"{folder}_{ending}"
    program = f"import datasets; datasets.load_from_disk({str(folder)!r}).{change}.save_to_disk({target!r})"
    return f'`python -c "{program}"` and set data.data_dir={target}.'
