"""Open lists of image files: csv and tsv with a header, jsonl with one object per line, txt with one path per line."""

import csv
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from src.core.errors import UserError
from src.data.arrow_writer import UNKNOWN_LABEL
from src.data.sources import FileSource

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMN = "label"
_NUMBER = re.compile(r"(-1|\d{1,9})(\.0+)?")
_WITH_NUMBER = re.compile(r"^(.*\S)[ \t]+(\d+)$")


def open_list(file: Path, image_column: str | None, label_column: str | None) -> FileSource:
    """Open the images of a list. Paths are relative to the folder of the list.

    Labels that are not all whole numbers are class names. In a txt in which every line ends in a number, that is the label.

    Raises:
        UserError: unreadable, empty, without such a column, or listing URLs or missing files.
    """
    try:
        rows = _text_rows(file) if file.suffix.lower() == ".txt" else _rows(file)
        first = next(rows, None)
        if first is None:
            raise UserError(f"{file} lists no images.")
        path = image_column or next((name for name in PATH_COLUMNS if name in first), None)
        label = label_column or LABEL_COLUMN
        # keep only two cells per row: millions of rows with captions would fill the memory
        cells = [(path and row.get(path), row.get(label)) for row in itertools.chain([first], rows)]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{file} can't be read as a list of images: {error}") from error
    if path is None or path not in first:
        given = f"data.image_column={image_column}: " if image_column else ""
        raise UserError(
            f"{given}{file} has the columns {', '.join(map(str, first))}; expected one of {', '.join(PATH_COLUMNS)}, or set "
            "data.image_column to the one that names the files."
        )
    if label_column is not None and label not in first:
        raise UserError(f"data.label={label}: {file} has no such column; it has {', '.join(first)}.")
    files = [name for name, _ in cells]
    odd = next((i for i, name in enumerate(files) if not isinstance(name, str) or not name), None)
    if odd is not None:
        raise UserError(f"{file}: entry {odd + 1} has no file name under {path!r}.")
    if re.match(r"[a-z0-9]+://", str(files[0])):
        raise UserError(
            f"{file} lists URLs, such as {files[0]}; expected image files. img2dataset downloads them as tars; set "
            "data.data_dir to its output folder."
        )
    if not (file.parent / str(files[0])).exists():
        raise UserError(f"{file}: its first image does not exist: {file.parent / str(files[0])}.")
    names = [str(name) for name in files]
    if label not in first:
        return FileSource(file.parent, names)
    numbers, classes = _labels([text for _, text in cells])
    return FileSource(file.parent, names, numbers, classes, None if classes else max(numbers) + 1)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as text:
        if file.suffix.lower() != ".jsonl":
            yield from csv.DictReader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            return
        for number, line in enumerate(text, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not a JSON object")
                yield row


def _text_rows(file: Path) -> Iterator[dict[str, Any]]:
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if all(map(_WITH_NUMBER.match, lines)) and not (lines and (file.parent / lines[0]).exists()):
        return ({"path": match[1], LABEL_COLUMN: match[2]} for match in map(_WITH_NUMBER.match, lines) if match)
    return ({"path": line} for line in lines)


def _labels(values: Sequence[Any]) -> tuple[list[int], list[str]]:
    """Return the labels and, if they are text, the class names. An empty label, NaN and -1 are -1; 3.0 is 3 (pandas)."""
    texts = ["" if value is None or value != value else str(value).strip() for value in values]
    if all(_NUMBER.fullmatch(text) for text in texts if text):
        return [int(float(text)) if text else UNKNOWN_LABEL for text in texts], []
    classes = sorted({text for text in texts if text})
    numbers = {name: i for i, name in enumerate(classes)}
    return [numbers.get(text, UNKNOWN_LABEL) for text in texts], classes
