"""Random access into Arrow files: rows equal pyarrow's, opening reads little, and damage is noticed."""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from src.core.errors import UserError
from src.data.arrow import ArrowSource
from src.data.arrow_writer import write_metadata
from src.data.decode import BadImage
from src.data.packed import open_files_limit
from src.data.sources import ReadOptions

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ENUM = pa.dictionary(pa.int8(), pa.string())
OTHERS: dict[str, tuple[pa.DataType, Any]] = {
    "text": (pa.string(), "some words"),
    "list": (pa.list_(pa.int32()), [1, 2, 3]),
    "nested": (pa.list_(pa.struct([("a", pa.list_(pa.string())), ("b", pa.bool_())])), [{"a": ["x"], "b": True}]),
    "fixed": (pa.list_(pa.float32(), 2), [1.0, 2.0]),
    "map": (pa.map_(pa.string(), pa.int64()), [("k", 1)]),
    "nothing": (pa.null(), None),
    "flag": (pa.bool_(), True),
    "enum": (ENUM, "cat"),
    "raw": (pa.binary(4), b"abcd"),
    "money": (pa.decimal128(8, 2), None),
}


def write(folder: Path, tables: Sequence[pa.Table], rows: int, kind: str = "stream", **options: Any) -> None:
    """Write a dataset with one file per table, in record batches of `rows` rows."""
    folder.mkdir()
    names = [f"data-{i}.arrow" for i in range(len(tables))]
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, new(sink, table.schema, **options) as writer:
            writer.write_table(table, max_chunksize=rows)
    write_metadata(folder, names, None, "train")


def parts(table: pa.Table, count: int) -> list[pa.Table]:
    size = -(-len(table) // count)
    return [table.slice(i * size, size) for i in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_rows_equal_those_of_pyarrow(seed: int, tmp_path: Path) -> None:
    draws = random.Random(seed)
    count = draws.randint(1, 60)
    image = draws.choice([STRUCT, pa.binary(), pa.large_binary(), pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())])])  # fmt: skip
    values = [None if draws.random() < 0.2 else draws.randbytes(draws.randint(0, 300)) for _ in range(count)]
    paths = [None if draws.random() < 0.3 else f"{i} ü.jpg" for i in range(count)]
    if pa.types.is_struct(image):
        values = [None if draws.random() < 0.1 else {"bytes": v, "path": p} for v, p in zip(values, paths, strict=True)]
    labels = pa.array([None if draws.random() < 0.2 else draws.randint(0, 100) for _ in range(count)], draws.choice([pa.int64(), pa.uint8(), pa.int32()]))  # fmt: skip
    columns = [("image", pa.array(values, image)), ("label", labels)]
    columns += [(n, pa.array([v if draws.random() < 0.8 else None for _ in range(count)], k)) for n, (k, v) in OTHERS.items() if draws.random() < 0.5]  # fmt: skip
    draws.shuffle(columns)
    table = pa.table(dict(columns))
    size, files = draws.randint(1, 20), draws.randint(1, 3)
    write(tmp_path / "set", parts(table, files), size, draws.choice(["stream", "file"]))
    source = ArrowSource(tmp_path / "set")
    assert len(source) == count
    for i, (value, label) in enumerate(zip(table["image"].to_pylist(), labels.to_pylist(), strict=True)):
        data = value["bytes"] if isinstance(value, dict) else value
        assert source.label(i) == (-1 if label is None else label)
        if data is not None:
            assert source.encoded(i) == data
        else:
            with pytest.raises(BadImage):
                source.encoded(i)
        if isinstance(value, dict) and value["path"]:
            assert value["path"] in source.name(i)


def small(folder: Path) -> bytes:
    rows = [{"bytes": bytes([i]) * (20 + i), "path": f"{i}.jpg"} for i in range(30)]
    write(folder, [pa.table({"image": pa.array(rows, STRUCT), "label": list(range(30))})], 10)
    return (folder / "data-0.arrow").read_bytes()


def damaged(whole: bytes) -> Iterator[bytes]:
    draws = random.Random(1)
    for length in range(0, len(whole), 97):
        yield whole[:length]
    for _ in range(400):
        broken = bytearray(whole)
        for _ in range(draws.randint(1, 4)):
            at = draws.randrange(len(whole))
            broken[at] = draws.choice([0, 255, broken[at] ^ (1 << draws.randrange(8)), 128])
        yield bytes(broken)
    for at in range(0, len(whole) - 8, 8):  # as a negative or a huge offset
        for value in (-1, 1 << 40, -(1 << 62)):
            if at % 64 == 0:
                yield whole[:at] + value.to_bytes(8, "little", signed=True) + whole[at + 8 :]


def test_damaged_file_is_rejected_or_reads_within_bounds(tmp_path: Path) -> None:
    whole = small(tmp_path / "set")
    file, refused = tmp_path / "set/data-0.arrow", 0
    for broken in damaged(whole):
        file.write_bytes(broken)
        try:
            source = ArrowSource(tmp_path / "set")
        except UserError:
            refused += 1
            continue
        for row in range(len(source)):
            source.name(row), source.label(row)
            with contextlib.suppress(BadImage):
                assert len(source.encoded(row)) <= len(whole)
    assert refused > 150


def test_truncated_file_is_rejected_at_any_length(tmp_path: Path) -> None:
    whole = small(tmp_path / "set")
    for length in itertools.chain(range(0, len(whole), 53), range(len(whole) - 12, len(whole))):
        (tmp_path / "set/data-0.arrow").write_bytes(whole[:length])
        with pytest.raises(UserError, match="data-0.arrow.*cut short or damaged"):
            ArrowSource(tmp_path / "set")


ONE = pa.table({"image": pa.array([b"x" * 5000])})
TWICE = pa.Table.from_arrays([pa.array([b"x"]), pa.array([1]), pa.array([2])], names=["image", "label", "label"])


@pytest.mark.parametrize(
    ("tables", "options", "says"),
    [
        ([pa.table({"image": pa.array([b"x"]), "label": [1]}), ONE], {}, "don't belong together: data-1.arrow"),
        ([ONE], {"options": pa.ipc.IpcWriteOptions(compression="zstd")}, "compressed"),
        ([TWICE], {}, "two with the same name"),
    ],
)
def test_files_without_random_access_are_rejected(
    tables: list[pa.Table], options: Any, says: str, tmp_path: Path
) -> None:
    write(tmp_path / "set", tables, 1, **options)
    with pytest.raises(UserError, match=says):
        ArrowSource(tmp_path / "set")


def two_images(folder: Path) -> Path:
    table = pa.table({"low": pa.array([b"l"]), "high": pa.array([b"h"]), "name": ["a.jpg"], "parts": [[b"x"]]})
    write(folder, [table], 1)
    return folder


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (None, r"more than one image column \(low, high\).*data.image_column=low"),
        ("middle", "data.image_column=middle.*no such column.*high"),
        ("name", "'name' of .* holds string.*cast_column"),
        ("parts", "'parts' of .* holds list"),
    ],
)
def test_image_column_can_be_chosen(wanted: str | None, says: str, tmp_path: Path) -> None:
    folder = two_images(tmp_path / "set")
    assert [ArrowSource(folder, ReadOptions(image=name)).encoded(0) for name in ("low", "high")] == [b"l", b"h"]
    with pytest.raises(UserError, match=says):
        ArrowSource(folder, ReadOptions(image=wanted))


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs /proc")
def test_opening_reads_little_and_keeps_few_files_open(tmp_path: Path) -> None:
    image = bytes(150_000)
    table = pa.table({"image": pa.array([{"bytes": image, "path": "x"}] * 400, STRUCT)})
    write(tmp_path / "set", parts(table, 20), 100)
    program = (
        "import sys; from pathlib import Path; from src.data.arrow import ArrowSource; import os\n"
        "def read(): return int(open('/proc/self/io').read().split()[1])\n"
        "def count(): return len(os.listdir('/proc/self/fd'))\n"
        "ArrowSource(Path(sys.argv[1])); before, fds = read(), count()\n"
        "source = ArrowSource(Path(sys.argv[1])); print(read() - before, count() - fds)\n"
        "before = read(); source.encoded(397); print(read() - before)\n"
        "sources = [source, ArrowSource(Path(sys.argv[1]))]\n"
        "for i in range(400): [s.encoded(i) for s in sources]\n"
        "print(count() - fds); del source, sources; print(count() - fds)"
    )
    shell = f"ulimit -n 64; exec {sys.executable} - {tmp_path / 'set'}"
    run = subprocess.run(["bash", "-c", shell], input=program, text=True, capture_output=True, check=True)
    opening, left_open, row, at_last, closed = map(int, run.stdout.split())
    assert opening < 0.01 * 400 * 150_000
    assert left_open <= 16 and at_last <= 16 and closed == 0
    assert row < 1.1 * 150_000
    assert open_files_limit() <= 512


def test_state_naming_files_outside_the_folder_is_rejected(tmp_path: Path) -> None:
    small(tmp_path / "set")
    for name in ("../set/data-0.arrow", str(tmp_path / "set/data-0.arrow"), 5):
        (tmp_path / "set/state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(UserError, match="state.json: `_data_files` lists"):
            ArrowSource(tmp_path / "set")
