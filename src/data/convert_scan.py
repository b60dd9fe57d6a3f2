"""List the images to convert (image files, tars or Parquet) by split, and cut them into one part per shard.

Each format yields its rows in a fixed order as `Entry`, whose bytes are read on demand.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from src.core.errors import UserError
from src.data import parquet
from src.data.arrow import class_names, schema_features
from src.data.decode import BadImage
from src.data.file_names import SPLIT_NAMES, find_split, is_pattern
from src.data.places import nested_splits, survey, telling_file
from src.data.sources import FileSource, class_files, folders, loose_files, printable
from src.data.tars import TarSource


class Entry(NamedTuple):
    """One row. `read` may raise BadImage."""

    name: str
    read: Callable[[], bytes]
    label: int | None


@dataclass(frozen=True)
class Tree:
    """The images to convert."""

    root: Path
    splits: "Mapping[str, Rows]"
    has_splits: bool
    """False: a single split, called `train`."""
    class_names: Sequence[str] | None
    """None: no labels; empty: integer labels without names."""
    outside: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of files that belong to no split or class."""

    @property
    def count(self) -> int:
        return sum(map(len, self.splits.values()))

    def folder(self, output: Path, split: str) -> Path:
        """Return the folder that a split is written to."""
        return output / split if self.has_splits else output


def scan(root: Path) -> Tree:
    """List the images of a folder, a file or a pattern: Parquet, tars, or a tree of files.

    A tree holds splits with class folders, class folders alone, or one flat folder; every file is tried, whatever its name,
    except hidden ones. Class numbers follow the sorted class names over all splits.

    Raises:
        UserError: nothing found, a folder without files, or Parquet without images.
    """
    if root.is_dir() and ((first := telling_file(root)) is None or first.suffix.lower() not in (".tar", ".parquet")):
        return _tree(root)
    if not root.exists() and not is_pattern(str(root)):
        raise UserError(f"--input_dir {root}: no such folder.")
    place = survey(root)
    if place.kind == "parquet":
        return _parquet(place.root, place.splits)
    if place.kind != "tars":
        raise UserError(f"--input_dir {root}: expected a folder of images, tar files or Parquet files.")
    tars = {split: TarSource(place.root, group) for split, group in place.splits.items()}
    labelled = all(tar.num_classes is not None for tar in tars.values())
    splits = {split: SourceRows(tar, 0, len(tar)) for split, tar in tars.items()}
    return Tree(place.root, splits, len(splits) > 1 or "train" not in splits, () if labelled else None)


@dataclass(frozen=True)
class SourceRows:
    """Image files or tar samples, from `start` to `stop`."""

    source: FileSource | TarSource
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def entries(self) -> Iterator[Entry]:
        for i in range(self.start, self.stop):
            yield Entry(printable(self.source.member(i)), partial(self.source.encoded, i), self.source.label(i))

    def parts(self, rows: int) -> Sequence["SourceRows"]:
        cuts = [(i, min(i + rows, self.stop)) for i in range(self.start, self.stop, rows)]
        if isinstance(self.source, FileSource):  # cut it, or each part would be pickled with all names
            return [SourceRows(self.source.cut(*cut), 0, cut[1] - cut[0]) for cut in cuts]
        return [SourceRows(self.source, *cut) for cut in cuts]

    def identity(self) -> Iterator[str]:
        yield self.source.fingerprint()

    def places(self) -> set[str]:
        return {os.path.dirname(name) for name in self.source.names}


class RowGroup(NamedTuple):
    file: str
    number: int
    rows: int


@dataclass(frozen=True)
class ParquetRows:
    """Row groups of Parquet files."""

    root: Path
    groups: tuple[RowGroup, ...]
    image: str
    label: str | None

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    def entries(self) -> Iterator[Entry]:
        import pyarrow.parquet as pq

        columns = [self.image, *([self.label] if self.label else [])]
        for group in self.groups:
            row = 0
            with pq.ParquetFile(self.root / group.file, memory_map=False) as file:
                for batch in file.iter_batches(100, [group.number], columns, use_threads=False):
                    labels = batch.column(self.label).to_pylist() if self.label else [None] * len(batch)
                    for value, label in zip(batch.column(self.image), labels, strict=True):
                        image = value.as_py()
                        if not isinstance(image, dict):
                            image = {"bytes": image}
                        name = image.get("path") or f"{group.file}, row {row} of group {group.number}"
                        yield Entry(printable(name), partial(_present, image.get("bytes")), label)
                        row += 1

    def parts(self, rows: int) -> Sequence["ParquetRows"]:
        found: list[list[RowGroup]] = [[]]
        for group in self.groups:
            if found[-1] and sum(one.rows for one in found[-1]) + group.rows > rows:
                found.append([])
            found[-1].append(group)
        return [ParquetRows(self.root, tuple(part), self.image, self.label) for part in found]

    def identity(self) -> Iterator[str]:
        for file in dict.fromkeys(group.file for group in self.groups):
            yield f"{file}\0{(self.root / file).stat().st_size}"
        yield f"{self.image}\0{self.label}\0{len(self)}"

    def places(self) -> set[str]:
        return {os.path.dirname(group.file) for group in self.groups}


Rows = SourceRows | ParquetRows
"""Rows of a split, or of one shard of it, readable in another process. `identity` yields lines that change with the rows, so
that a half-finished conversion of other rows is not resumed; `places` returns their folders."""


def _present(data: bytes | None) -> bytes:
    if data is None:
        raise BadImage("no bytes in its row")
    return data


def _parquet(root: Path, groups: dict[str, list[str]]) -> Tree:
    first = root / next(iter(groups.values()))[0]
    image = parquet.image_column(first)
    if image is None:
        raise UserError(
            f"--input_dir {root}: {first.name} has no images in its columns ({', '.join(parquet.read_schema(first).names[:8])}): "
            "metadata, or image URLs. img2dataset downloads URLs as tars; pass its output folder."
        )
    schema = parquet.read_schema(first)
    whole = "label" in schema.names and str(schema.field("label").type).lstrip("u").startswith("int")
    splits = {}
    for split, files in groups.items():
        found: list[RowGroup] = []
        for file in files:
            facts = parquet.read_metadata(root / file)
            if missing := {image, *(["label"] if whole else [])} - set(facts.schema.to_arrow_schema().names):
                raise UserError(f"--input_dir {root}: {file} has no column {missing.pop()!r}, but {first.name} has.")
            found += [RowGroup(file, i, facts.row_group(i).num_rows) for i in range(facts.num_row_groups)]
        splits[split] = ParquetRows(root, tuple(found), image, "label" if whole else None)
    has_splits = len(splits) > 1 or "train" not in splits
    return Tree(root, splits, has_splits, (class_names(schema_features(schema), "label") or ()) if whole else None)


def _tree(root: Path) -> Tree:
    names = folders(root)
    by_split = {same[0]: found for same in SPLIT_NAMES if (found := find_split(same[0], names)) is not None}
    has_splits = "train" in by_split or (bool(by_split) and len(by_split) == len(names))
    if not has_splits and (nested := nested_splits(root)) is not None:
        return _tree(nested)
    places = by_split if has_splits else {"train": ""}
    classes = sorted({name for place in places.values() for name in folders(root / place)})
    outside = [(n, "a folder beside the splits") for n in names if n not in places.values()] if has_splits else []
    splits: dict[str, Rows] = {}
    for split, place in places.items():
        files, labels = class_files(root, classes, place=place)
        loose = [os.path.join(place, name) for name in loose_files(root / place)]
        if folders(root / place):
            outside += [(path, "beside the class folders, so without a class") for path in loose]
        else:
            files, labels = loose, []
        if files:
            splits[split] = SourceRows(FileSource(root, files, labels, classes), 0, len(files))
    if not splits:
        raise UserError(f"--input_dir {root}: no files in it; expected images in one folder per class.")
    return Tree(root, splits, has_splits, classes or None, outside)
