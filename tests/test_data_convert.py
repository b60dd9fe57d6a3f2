"""Conversion keeps every good image, lists every bad file, leaves nothing half-written, and resumes after a kill."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from src.core import files as core_files
from src.core.errors import UserError
from src.data import convert as conversion
from src.data import dummy
from src.data.arrow import ArrowSource
from src.data.convert import convert
from src.data.convert_scan import scan
from src.data.convert_shard import Settings
from src.data.sources import MAX_FILE_BYTES
from src.data.splits import open_splits
from tests.test_data_decode import encoded
from tests.test_data_places import image_tar, parquet
from tests.test_data_sources import FILES, hf_dataset
from tests.test_data_tars import tar

SCRIPT = Path(__file__).parents[1] / "scripts/create_hf_test_data.py"
COPY, TRUST = Settings(None, 80.0), Settings(None, 80.0, trust=True)


def tree(root: Path, count: int = 12, split: str = "") -> Path:
    for i in range(count):
        path = root / split / ("dog", "cat", "émeu")[i % 3] / f"{i:04d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[i % 12])
    return root


def run(root: Path | str, output: Path, settings: Settings = COPY, **options: Any) -> conversion.Report:
    return convert(scan(Path(root)), output, settings, **{"num_workers": 1, "overwrite": False, **options})


def rows(path: Path) -> dict[str, tuple[bytes, str]]:
    """Read a dataset as path in the row -> (bytes, class name)."""
    data = datasets.load_from_disk(str(path)).cast_column("image", datasets.Image(decode=False))
    names = data.features["label"].names
    return {r["image"]["path"]: (r["image"]["bytes"], names[r["label"]]) for r in data}


def expected(root: Path) -> dict[str, tuple[bytes, str]]:
    files = [p for p in root.rglob("*") if p.is_file()]
    return {str(p.relative_to(root)): (p.read_bytes(), p.relative_to(root).parts[0]) for p in files}


@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_and_classes_are_kept(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "SHARD_IMAGES", (10, 10))
    root = tree(tmp_path / "in", 150)
    report = run(root, tmp_path / "out", num_workers=workers)
    assert rows(tmp_path / "out") == expected(root)
    assert (report.images, report.classes, report.bad) == ({"train": 150}, 3, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert len(list((tmp_path / "out").glob("data-*.arrow"))) == 15
    assert not (tmp_path / "out/.conversion").exists()
    assert len(ArrowSource(tmp_path / "out")) == 150


def test_splits_share_their_classes_and_may_be_unlabelled(tmp_path: Path) -> None:
    root = tree(tmp_path / "in", 9, "train")
    for name in ("dog", "zebra"):
        (root / "val" / name).mkdir(parents=True)
        (root / "val" / name / "1.jpg").write_bytes(FILES[1])
    report = run(root, tmp_path / "out")
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert {k: len(v) for k, v in loaded.items()} == report.images == {"train": 9, "validation": 2}
    names = loaded["train"].features["label"].names
    assert names == ["cat", "dog", "zebra", "émeu"]
    assert [names[label] for label in loaded["validation"]["label"]] == ["dog", "zebra"]
    for file in sorted((root / "val").rglob("*.jpg")):
        file.rename(root / "val" / f"{file.parent.name}.jpg")
        file.parent.rmdir()
    run(root, tmp_path / "out", overwrite=True)
    assert datasets.load_from_disk(str(tmp_path / "out"))["validation"]["label"] == [-1, -1]
    run(root / "val", tmp_path / "flat")
    assert datasets.load_from_disk(str(tmp_path / "flat")).column_names == ["image"]


def bad_tree(root: Path) -> tuple[Path, set[str]]:
    """Write every kind of bad file beside good ones; return (root, names of the bad ones)."""
    good = tree(root, 6)
    png = encoded(Image.new("RGB", (40, 30), (9, 200, 9)), "PNG")
    bad = {
        "truncated.JPEG": FILES[0][: len(FILES[0]) // 2],
        "truncated.png": png[:60],
        "text.jpg": b"no image at all",
        "größe_0.jpg": b"",
        "bomb.png": png[:16] + (60000).to_bytes(4, "big") * 2 + png[24:],
        "page.html.jpg": b"<html>404</html>" * 50,
        "Thumbs.db": bytes(5000),
    }
    kept = {
        "png_called.JPEG": png,
        "jpeg_called.png": FILES[1],
        "noextension": FILES[2],
        "alpha.webp": encoded(Image.new("RGBA", (40, 30)), "WEBP"),
        "odd \udcff name.jpg": FILES[3],
    }
    for name, data in (bad | kept).items():
        (good / "cat" / name).write_bytes(data)
    (good / "cat/dangling.jpg").symlink_to(root / "nowhere")
    os.mkfifo(good / "cat/pipe.jpg")
    (good / "cat/huge.jpg").touch()
    os.truncate(good / "cat/huge.jpg", MAX_FILE_BYTES + 1)
    (good / "cat/.hidden.jpg").write_bytes(b"x")
    (good / "beside.jpg").write_bytes(FILES[0])
    names = {*bad, "dangling.jpg", "pipe.jpg", "huge.jpg"}
    if os.geteuid() != 0:  # nothing is unreadable for root
        (good / "cat/locked.jpg").write_bytes(FILES[0])
        (good / "cat/locked.jpg").chmod(0)
        names.add("locked.jpg")
    return good, names


def test_every_kind_of_bad_file_is_listed_and_every_good_one_kept(tmp_path: Path) -> None:
    root, bad = bad_tree(tmp_path / "in")
    report = run(root, tmp_path / "out")
    assert {Path(b["file"]).name for b in report.bad} == bad | {"beside.jpg"}
    assert all(b["reason"] and "\n" not in b["reason"] for b in report.bad)
    assert {"file": "cat/huge.jpg", "reason": f"a file of {MAX_FILE_BYTES + 1:,} bytes"} in report.bad
    assert {"file": "cat/dangling.jpg", "reason": "can't be read: No such file or directory"} in report.bad
    assert report.images == {"train": 6 + 5}
    written = json.loads((tmp_path / "out/conversion_report.json").read_text())
    assert written["bad"] == report.bad
    assert written["images"] == report.images
    assert all(row["image"].size for row in datasets.load_from_disk(str(tmp_path / "out")))


def test_resizing(tmp_path: Path) -> None:
    root = tmp_path / "in"
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.fromarray(dummy.picture(np.random.default_rng(1), "disc"))
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for name, image, options in (
            ("large.jpg", photo.resize((200, 100)), {"exif": exif}),
            ("small.png", photo.resize((30, 40)), {}),
            ("exact.jpg", photo.resize((64, 90)), {}),
            ("exact_turned.jpg", photo.resize((90, 64)), {"exif": exif}),
        ):
            image.save(root / split / "a" / name, **options)
    run(root, tmp_path / "out", Settings(64, 80.0))
    loaded = datasets.load_from_disk(str(tmp_path / "out")).cast_column("image", datasets.Image(decode=False))
    stored = {Path(r["image"]["path"]).name: r["image"]["bytes"] for r in loaded["train"]}
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in stored.items()}
    assert sizes == {"large.jpg": (64, 128), "small.png": (64, 85), "exact.jpg": (64, 90), "exact_turned.jpg": (64, 90)}
    assert stored["exact.jpg"] == (root / "train/a/exact.jpg").read_bytes()
    reference = encoded(Image.new("RGB", (8, 8)), "JPEG", quality=95)
    tables = [
        Image.open(io.BytesIO(data)).quantization for data in (reference, stored["large.jpg"], stored["small.png"])
    ]
    assert tables[0] == tables[1] == tables[2]
    assert all(0x0112 not in Image.open(io.BytesIO(data)).getexif() for data in stored.values())
    for row in loaded["validation"]:  # the reference images of rFID are not resized
        assert row["image"]["bytes"] == (root / row["image"]["path"]).read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("mark", ["", "state.json"])
def test_output_never_replaces_the_input_images(overwrite: bool, mark: str, tmp_path: Path) -> None:
    root, elsewhere = tree(tmp_path / "home/in"), tree(tmp_path / "elsewhere")
    (root / "linked").symlink_to(elsewhere / "dog")
    (tmp_path / "link").symlink_to(root)
    for folder in (root, root.parent, elsewhere) if mark else ():
        (folder / mark).write_text("{}")  # a folder that looks like a dataset may still hold the images
    before = contents(tmp_path)
    inside = [root / "cat", root / "new/hf", tmp_path / "link/new"]
    refused = {root: "is", tmp_path / "link": "is", root.parent: "holds", elsewhere: "holds"} | dict.fromkeys(
        inside, "lies in"
    )
    for output, how in refused.items():
        with pytest.raises(UserError, match=rf"--output_dir .*{how} the folder of images .*Choose a separate folder"):
            run(root, output, overwrite=overwrite)
    with pytest.raises(UserError, match="holds the folder of images"):  # OUTPUT.partial is written and deleted, too
        run(tree(tmp_path / "x.partial/in"), tmp_path / "x", overwrite=overwrite)
    assert before.items() <= contents(tmp_path).items()
    assert len(contents(tmp_path)) == len(before) + 12


def test_only_a_dataset_is_replaced_and_only_with_overwrite(tmp_path: Path) -> None:
    root, mine = tree(tmp_path / "in"), tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"mine is not empty .*no dataset.*--overwrite does not delete it"):
            run(root, mine, overwrite=overwrite)
        with pytest.raises(UserError, match="is a file; give a folder"):
            run(root, tmp_path / "file", overwrite=overwrite)
    assert contents(mine) == {"thesis.txt": b"years of work"}
    (tmp_path / "empty").mkdir()
    run(root, tmp_path / "empty")
    with pytest.raises(UserError, match="replace it with --overwrite"):
        run(root, tmp_path / "empty")
    (root / "cat/new.jpg").write_bytes(FILES[5])
    run(root, tmp_path / "empty", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "in", "mine"]
    for mark in ("conversion_report.json", "dataset_dict.json", "dataset_info.json", "state.json"):
        output = tmp_path / mark.partition(".")[0]
        output.mkdir()
        (output / mark).write_text("{}")
        run(root, output, overwrite=True)
        assert rows(output) == rows(tmp_path / "empty") == expected(root)


def test_foreign_folders_named_old_or_partial_are_kept(tmp_path: Path) -> None:
    root, output = tree(tmp_path / "in"), tmp_path / "out"
    run(root, output)
    for name in ("out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out\.partial is in the way.*Move it away"):
        run(root, output, overwrite=True)
    (tmp_path / "out.partial").rename(tmp_path / "moved")
    (tmp_path / "out.partial/.conversion").mkdir(parents=True)  # killed right after the start
    (tmp_path / "out.partial/.conversion/.settings.json.1.writing").write_text("{")
    run(root, output, overwrite=True)
    assert rows(output) == expected(root)
    assert contents(tmp_path / "out.old") == contents(tmp_path / "moved") == {"mine.txt": b"mine"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "moved", "out", "out.old"]


def test_old_dataset_is_restored_if_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, output = tree(tmp_path / "in"), tmp_path / "out"
    run(root, output)
    before, replace = contents(output), os.replace

    def refusing(source: Path, target: Path) -> None:
        if target == output:
            assert (source / "state.json").is_file()  # the new one is complete before the old one moves
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    (root / "cat/new.jpg").write_bytes(FILES[5])
    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(UserError, match="Input/output error"):
        run(root, output, overwrite=True)
    assert contents(output) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "out.partial"]
    monkeypatch.setattr(os, "replace", replace)
    assert run(root, output, overwrite=True).shards_reused == 1
    assert rows(output) == expected(root)


def test_dummy_datasets_replace_only_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script changes it
    from scripts.create_hf_test_data import make_own

    monkeypatch.setattr(core_files, "PROJECT_ROOT", tmp_path)
    (tmp_path / "data/test_hf").mkdir(parents=True)
    (tmp_path / "data/test_hf/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="no dataset"):
        make_own(False, overwrite=True)
    (tmp_path / "data/test_hf").rename(tmp_path / "mine")
    run(tree(tmp_path / "in"), tmp_path / "elsewhere")
    (tmp_path / "data/test_hf").symlink_to(tmp_path / "elsewhere")
    make_own(False, overwrite=True)  # replaces the link, not its target
    assert [len(ArrowSource(tmp_path / name)) for name in ("data/test_hf", "elsewhere")] == [20, 12]
    (tmp_path / "data/test_hf/state.json").write_text("{")
    make_own(False, overwrite=True)
    assert len(ArrowSource(tmp_path / "data/test_hf")) == 20


def stop_at(images: int, error: BaseException | None = None) -> Callable[[int], None]:
    """Return a progress callback that stops the conversion once `images` files are done."""

    def progress(done: int) -> None:
        if done >= images:
            raise error or KeyboardInterrupt

    return progress


def test_full_disk_keeps_finished_shards(tmp_path: Path) -> None:
    root, output = tree(tmp_path / "in", 150), tmp_path / "out"
    full = stop_at(100, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match=r"(?s)disk is full.*same command"):
        run(root, output, progress=full)
    (tmp_path / "out.partial/.data-00002-of-00003.arrow.1.writing").write_bytes(b"half")
    assert not output.exists()
    assert run(root, output).shards_reused == 2
    assert not list(output.rglob("*.writing"))
    assert rows(output) == expected(root)


def test_folder_created_during_the_conversion_is_kept(tmp_path: Path) -> None:
    root, output = tree(tmp_path / "in"), tmp_path / "out"

    def appear(done: int) -> None:
        if done == 12:
            output.mkdir()
            (output / "mine.txt").write_text("mine")

    with pytest.raises(UserError, match="no dataset"):
        run(root, output, progress=appear)
    assert contents(output) == {"mine.txt": b"mine"}
    output.rename(tmp_path / "moved")
    assert run(root, output).shards_reused == 1


def test_resume_with_other_settings_is_rejected(tmp_path: Path) -> None:
    root, output = tree(tmp_path / "in", 150), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(root, output, progress=stop_at(150))
    with pytest.raises(UserError, match="resize_shorter_px: then None, now 64"):
        run(root, output, Settings(64, 80.0))
    with pytest.raises(UserError, match=r"half-|no dataset_info|state.json"):
        ArrowSource(tmp_path / "out.partial")
    (root / "cat/new.jpg").write_bytes(FILES[5])
    with pytest.raises(UserError, match="files: then 150, now 151"):
        run(root, output)
    assert run(root, output, overwrite=True).shards_reused == 0
    assert rows(output) == expected(root)


def test_input_without_images_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "in/a").mkdir(parents=True)
    for name, says in (("in", "no files"), ("nowhere", "no such folder")):
        with pytest.raises(UserError, match=says):
            run(tmp_path / name, tmp_path / "out")
    (tmp_path / "in/a/x.txt").write_text("text")
    with pytest.raises(UserError, match=r"None of the 1 files.*a/x\.txt"):
        run(tmp_path / "in", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def script(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.mark.parametrize("kind", ["tree", "parquet"])
def test_killed_conversion_resumes(kind: str, tmp_path: Path) -> None:
    root, output = tmp_path / "in", tmp_path / "out"
    if kind == "tree":
        tree(root, 600)
    else:
        root.mkdir()
        hf_dataset(1200).to_parquet(root / "train-00000-of-00001.parquet", batch_size=50)
        assert pq.ParquetFile(root / "train-00000-of-00001.parquet").num_row_groups == 24
    words = ["--input_dir", root, "--output_dir", output, "--num_workers", "1" if kind == "parquet" else "2"]
    partial = tmp_path / "out.partial"
    right_after_the_start, in_the_middle = (
        partial.exists,
        lambda: len(list(partial.glob(".conversion/train-*.json"))) >= 2,
    )
    for begun in (right_after_the_start, in_the_middle):
        process = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, words)], stdout=subprocess.DEVNULL)
        while not begun() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
    done = script(*words)
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "conversion_report.json").read_text())
    assert report["shards_reused"] >= 1 and "Resumed an interrupted conversion" in done.stdout
    assert not partial.exists()
    if kind == "tree":
        assert rows(output) == expected(root)
        return
    assert report["images"] == {"train": 1200}
    source = open_splits(output, None, "train", None, 1.0).train
    assert [source.encoded(i) for i in range(0, 1200, 97)] == [FILES[i % 20] for i in range(0, 1200, 97)]


def test_script_reports_and_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    root, bad = bad_tree(tmp_path / "in")
    done = script("--input-dir", root, "--output-dir", tmp_path / "out", "--num_workers", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{len(bad) + 1} left out" in done.stdout
    assert "truncated.JPEG: " in done.stdout and r"gr\xf6\xdfe_0.jpg: " in done.stdout
    again = script("--input_dir", root, "--output_dir", tmp_path / "out")
    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr
    assert script("--resize_shorter", "-3").returncode == 2


# -- Parquet and tars


@pytest.mark.parametrize("settings", [COPY, TRUST])
def test_parquet_of_the_hub(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "SHARD_IMAGES", (5, 5))
    report = run(parquet(tmp_path / "hub"), tmp_path / "out", settings)
    assert (report.images, report.classes, report.bad) == ({"train": 12, "validation": 12}, 2, [])
    splits = open_splits(tmp_path / "out", None, "train", "validation", 1.0)
    assert [splits.train.encoded(i) for i in range(12)] == FILES[:12]
    assert splits.train.class_names == ["cat", "dog"] and [splits.train.label(i) for i in range(4)] == [0, 1, 0, 1]
    assert len(list((tmp_path / "out/train").glob("*.arrow"))) > 1
    assert datasets.load_from_disk(str(tmp_path / "out"))["train"][3]["image"].size


def test_damaged_rows_are_left_out_unless_trusted(tmp_path: Path) -> None:
    rows = [{"bytes": FILES[i] if i != 3 else b"broken", "path": f"{i}.jpg"} for i in range(8)]
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict({"image": rows}, datasets.Features({"image": datasets.Image()})).to_parquet(
        tmp_path / "hub/train.parquet"
    )
    report = run(tmp_path / "hub", tmp_path / "out")
    assert report.images == {"train": 7} and [b["file"] for b in report.bad] == ["3.jpg"]
    assert run(tmp_path / "hub/train.parquet", tmp_path / "trusted", TRUST).images == {"train": 8}
    resized = run(tmp_path / "hub", tmp_path / "small", Settings(64, 80.0, trust=True))
    assert resized.images == {"train": 7}  # resizing has to decode


def test_tars(tmp_path: Path) -> None:
    for split, count in (("train", 7), ("val", 3)):
        image_tar(tmp_path / "in" / split / "0.tar", count)
    report = run(tmp_path / "in", tmp_path / "out")
    assert report.images == {"train": 7, "validation": 3}
    splits = open_splits(tmp_path / "out", None, "train", "validation", 1.0)
    assert [splits.train.encoded(i) for i in range(7)] == FILES[:7]
    assert [splits.train.label(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0] and splits.train.num_classes == 3
    unlabelled = tar(tmp_path / "web/0.tar", [(f"{i}.jpg", FILES[i]) for i in range(4)])
    run(unlabelled, tmp_path / "web_hf")
    assert open_splits(tmp_path / "web_hf", None, "train", None, 1.0).train.num_classes is None
    run(f"{tmp_path}/in/train/{{0..0}}.tar", tmp_path / "pattern")
    assert len(open_splits(tmp_path / "pattern", None, "train", None, 1.0).train) == 7


def test_truncated_parquet_or_one_without_images_is_rejected(tmp_path: Path) -> None:
    hub = parquet(tmp_path / "hub", ("train",))
    first = sorted(hub.rglob("*.parquet"))[0]
    os.truncate(first, 500)
    with pytest.raises(UserError, match=f"{first.name} .500 bytes. can't be read as Parquet.*again"):
        run(hub, tmp_path / "out")
    datasets.Dataset.from_dict({"url": ["a"], "caption": ["b"]}).to_parquet(tmp_path / "meta/0.parquet")
    with pytest.raises(UserError, match="no images in its columns .url, caption.*img2dataset"):
        run(tmp_path / "meta", tmp_path / "out")
