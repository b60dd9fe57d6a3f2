"""Random access into tars: members equal tarfile's, samples and labels, an index that is built once."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from src.core.errors import UserError
from src.data import index_files
from src.data.decode import BadImage
from src.data.packed import Damaged, OpenFile
from src.data.tar_index import Window, index_tar, members
from src.data.tars import TarSource

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar(path: Path, files: Sequence[tuple[str, bytes]], kind: str = "gnu") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[kind]) as out:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """Return members as in a webdataset: image, class, text."""
    files = []
    for i in range(start, start + count):
        files += [(f"{i:05d}.cls", str(i % 7).encode()), (f"{i:05d}.jpg", b"image %d" % i), (f"{i:05d}.txt", b"words")]
    return files


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seed", range(4))
def test_members_equal_those_of_tarfile(kind: str, seed: int, tmp_path: Path) -> None:
    draws = random.Random(seed)
    longest = 140 if kind == "ustar" else 400
    with tarfile.open(tmp_path / "t.tar", "w", format=FORMATS[kind]) as out:
        for i in range(60):
            length = draws.choice([5, 60, 99, 100, 101, 130, longest])
            parts = [draws.choice(["a", "bü", ".hidden", "c" * 40, "."]) for _ in range(4)]
            name = "/".join(parts)[: length - 12].rstrip("/") + f"/{i:03d}.jpg"
            if kind == "ustar" and len(name.encode()) > 99:
                name = "d" * 60 + "/" + "e" * 30 + f"/{i}.jpg"
            info = tarfile.TarInfo(name)
            info.type = draws.choice([tarfile.REGTYPE] * 5 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.AREGTYPE])  # fmt: skip
            info.linkname = "target" * draws.choice([1, 15 if kind == "ustar" else 40])
            data = draws.randbytes(draws.choice([0, 1, 511, 512, 513, 5000]))
            if info.isreg():
                info.size = len(data)
            if kind == "pax":
                info.pax_headers = {"comment": "x" * draws.randint(0, 600)}
            info.mtime = draws.choice([0, 1e9 + 0.5])
            out.addfile(info, io.BytesIO(data) if info.isreg() else None)
    with tarfile.open(tmp_path / "t.tar") as reference:
        expected = [(m.name, m.offset_data, m.size) for m in reference if m.isreg()]
    found = members(Window(OpenFile(tmp_path / "t.tar")))
    assert [(m.name, m.offset_data, m.size) for m in found] == expected


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_found_twice_as_fast_as_by_tarfile(kind: str, tmp_path: Path) -> None:
    """In CPU time: web-scale datasets have a hundred million members."""
    with tarfile.open(tmp_path / "t.tar", "w", format=FORMATS[kind]) as out:
        for i in range(3000):
            info = tarfile.TarInfo(f"{i:07d}.jpg")
            info.mtime = 0.5  # as webdataset writes it: adds PAX records
            out.addfile(info)

    def fastest(count: Callable[[], int]) -> float:
        times = []
        for _ in range(3):
            began = time.process_time()
            assert count() == 3000
            times.append(time.process_time() - began)
        return min(times)

    def by_tarfile() -> int:
        with tarfile.open(tmp_path / "t.tar", "r:") as file:
            return len(file.getmembers())

    own = fastest(lambda: len(list(members(Window(OpenFile(tmp_path / "t.tar"))))))
    assert own < fastest(by_tarfile) / 2


def test_sizes_in_base_256_and_global_headers(tmp_path: Path) -> None:
    path = tar(tmp_path / "t.tar", [("a.jpg", b"x" * 700), ("b.jpg", b"y")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    found = members(Window(OpenFile(path)))
    assert [(m.name, m.offset_data, m.size) for m in found] == [("a.jpg", 512, 700), ("b.jpg", 2048, 1)]
    with tarfile.open(tmp_path / "g.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}) as out:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        out.addfile(info, io.BytesIO(b"abc"))
    assert [m.size for m in members(Window(OpenFile(tmp_path / "g.tar")))] == [3]


def test_samples(tmp_path: Path) -> None:
    files = [
        ("one.jpg", b"1"), ("one.mask.png", b"m"), ("one.cls", b"5"),
        ("./dir.v2/two.txt", b"t"), ("./dir.v2/two.cls", b"6\n"), ("./dir.v2/two.PNG", b"2"), ("./dir.v2/two.jpg", b"second"),
        ("three.json", b"{}"), ("three.txt", b""),
        ("dir.v2/._two.jpg", b"apple"), (".hidden/four.jpg", b"h"),
        ("five", b"no dot"), ("six.webp", b"6"),
    ]  # fmt: skip
    source = TarSource(tmp_path, [tar(tmp_path / "t.tar", files).name])
    assert [source.encoded(i) for i in range(len(source))] == [b"1", b"2", b"6"]
    assert [source.label(i) for i in range(3)] == [5, 6, -1] and source.num_classes == 7
    assert source.name(1) == f"./dir.v2/two.PNG in {tmp_path / 't.tar'}"
    rows = index_tar(OpenFile(tmp_path / "t.tar"))
    assert (rows.without_image, rows.examples) == (2, ["three.txt", "five"])
    with pytest.raises(IndexError):
        source.encoded(3)


@pytest.mark.parametrize(
    ("label", "members_", "expected"),
    [
        (None, [("a.jpg", b""), ("a.cls", b"3")], 3),
        ("cls", [("a.cls", b"3"), ("a.jpg", b"")], 3),
        ("json:label", [("a.jpg", b""), ("a.json", b'{"label": 9}'), ("a.cls", b"3")], 9),
        (None, [("a.jpg", b""), ("a.cls", b"dog")], None),
        (None, [("a.jpg", b""), ("a.cls", b"-4")], None),
        (None, [("a.jpg", b"")], None),
        ("cls", [("a.jpg", b""), ("a.cls", b"dog")], "1 of|all of.*no whole number"),
        ("json:label", [("a.jpg", b""), ("a.json", b'{"label": "dog"}')], "no whole number"),
        ("json:label", [("a.jpg", b""), ("a.json", b"[")], "no whole number"),
        ("json:", [("a.jpg", b"")], "expected null, cls, or json:KEY"),
        ("class", [("a.jpg", b"")], "expected null, cls, or json:KEY"),
    ],
)
def test_labels(label: str | None, members_: list[tuple[str, bytes]], expected: object, tmp_path: Path) -> None:
    tar(tmp_path / "t.tar", members_)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"data.label={label}: .*({expected})"):
            TarSource(tmp_path, ["t.tar"], label)
        return
    source = TarSource(tmp_path, ["t.tar"], label)
    assert source.label(0) == expected
    assert source.num_classes == (None if expected is None else expected + 1)


def backwards(whole: bytes) -> bytes:
    """Give the first member an unknown type and a negative size, so that its end lies before it."""
    head = bytearray(whole[:512])
    head[124:136], head[156:157] = (-1024).to_bytes(12, "big", signed=True), b"Z"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + whole[512:]


def test_damaged_tars_are_rejected(tmp_path: Path) -> None:
    whole = tar(tmp_path / "t.tar", samples(12)).read_bytes()
    path = tmp_path / "t.tar"
    for length in range(0, len(whole) - 10240, 700):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"t\.tar.*can't be read as a tar.*(cut short|empty).*Copy or download"):
            TarSource(tmp_path, ["t.tar"])
    for data, says in (
        (b"\x1f\x8b\x08" + bytes(600), "compressed with gzip.*gunzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
        (backwards(whole), "cut short within 00000.cls"),
        (b"<html>" + b" " * 2000, "no readable tar header at byte 0"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=says):
            TarSource(tmp_path, ["t.tar"])
    tar(path, [("photo 10.30.jpg", b"image"), ("readme.txt", b"no images")])
    with pytest.raises(UserError, match=r"No images in the 1 tar files.*one dot.*photo 10\.30\.jpg, readme\.txt"):
        TarSource(tmp_path, ["t.tar"])


def test_damaged_tar_is_rejected_or_reads_within_bounds(tmp_path: Path) -> None:
    whole, draws = tar(tmp_path / "t.tar", samples(6), "pax").read_bytes(), random.Random(3)
    for _ in range(600):
        broken = bytearray(whole)
        for _ in range(draws.randint(1, 3)):
            broken[draws.randrange(len(whole) // 512) * 512 + draws.choice([0, 124, 130, 148, 156, 257, draws.randrange(512)])] = draws.choice([0, 255, 49, 120, 128])  # fmt: skip
        (tmp_path / "t.tar").write_bytes(broken)
        with contextlib.suppress(Damaged):
            for member in members(Window(OpenFile(tmp_path / "t.tar"))):
                assert 0 <= member.offset_data <= member.offset_data + member.size <= len(whole)


def test_index_is_built_once_and_rebuilt_for_changed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar(tmp_path / "a.tar", samples(5))
    tar(tmp_path / "b.tar", samples(4, 5))
    first = TarSource(tmp_path, ["a.tar", "b.tar"])
    again = TarSource(tmp_path, ["a.tar", "b.tar"])
    assert (first.index_built, again.index_built) == (True, False)
    assert [again.encoded(i) for i in range(9)] == [b"image %d" % i for i in range(9)]
    assert [again.label(i) for i in range(9)] == [i % 7 for i in range(9)]
    copy = pickle.loads(pickle.dumps(again))
    assert copy.encoded(8) == b"image 8" and not copy.index_built
    assert len(pickle.dumps(again)) < 1000
    assert again.index_path.stat().st_size < 20 * 9 + 500
    tar(tmp_path / "b.tar", samples(6, 5))
    changed = TarSource(tmp_path, ["a.tar", "b.tar"])
    assert changed.index_built and len(changed) == 11
    assert changed.fingerprint() != first.fingerprint()
    assert len(list(changed.index_path.parent.glob("*.idx"))) == 1  # the outdated one is deleted
    changed.index_path.write_bytes(changed.index_path.read_bytes()[:-1])
    assert TarSource(tmp_path, ["a.tar", "b.tar"]).index_built  # a damaged index is rebuilt
    with pytest.raises(BadImage):
        os.truncate(tmp_path / "b.tar", 600)
        changed.encoded(10)
    monkeypatch.setattr(index_files.os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tar(tmp_path / "b.tar", samples(2, 5))
    assert TarSource(tmp_path, ["a.tar", "b.tar"]).index_path.is_relative_to(tmp_path / "cache")


def _open(folder: Path) -> bool:
    return TarSource(folder, ["t.tar"]).index_built


def test_index_is_built_by_one_of_several_processes(tmp_path: Path) -> None:
    tar(tmp_path / "t.tar", samples(800))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert sum(pool.map(_open, [tmp_path] * 3, 1)) == 1


def test_json_labels_keep_their_own_index(tmp_path: Path) -> None:
    files = [("a.jpg", b"a"), ("a.json", json.dumps({"k": 2}).encode()), ("a.cls", b"1")]
    tar(tmp_path / "t.tar", files)
    assert [TarSource(tmp_path, ["t.tar"], label).label(0) for label in ("cls", "json:k", None)] == [1, 2, 1]
