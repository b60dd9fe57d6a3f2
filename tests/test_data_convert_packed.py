"""Parquet and tars to a dataset: nothing decoded twice, one copy, and what a killed conversion did is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from src.core.errors import UserError
from src.data import convert as conversion
from src.data import dummy
from src.data.convert import convert
from src.data.convert_scan import scan
from src.data.convert_shard import Settings
from src.data.splits import open_splits
from tests.test_data_places import image_tar, parquet
from tests.test_data_sources import hf_dataset
from tests.test_data_tars import tar

SCRIPT = Path(__file__).parents[1] / "scripts/create_hf_test_data.py"
FILES = [dummy.jpeg(i) for i in range(20)]
COPY, TRUST = Settings(None, 80.0), Settings(None, 80.0, trust=True)


def run(root: Path | str, output: Path, settings: Settings = COPY) -> conversion.Report:
    return convert(scan(Path(root)), output, settings, num_workers=1, overwrite=False)


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


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
    assert resized.images == {"train": 7}  # what is resized is decoded


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


def test_parquet_without_images_or_cut_is_named(tmp_path: Path) -> None:
    hub = parquet(tmp_path / "hub", ("train",))
    first = sorted(hub.rglob("*.parquet"))[0]
    os.truncate(first, 500)
    with pytest.raises(UserError, match=f"{first.name} .500 bytes. can't be read as Parquet.*again"):
        run(hub, tmp_path / "out")
    datasets.Dataset.from_dict({"url": ["a"], "caption": ["b"]}).to_parquet(tmp_path / "meta/0.parquet")
    with pytest.raises(UserError, match="no images in its columns .url, caption.*img2dataset"):
        run(tmp_path / "meta", tmp_path / "out")


def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    hub = tmp_path / "hub/data"
    hub.mkdir(parents=True)
    hf_dataset(1200).to_parquet(hub / "train-00000-of-00001.parquet", batch_size=50)
    assert pq.ParquetFile(hub / "train-00000-of-00001.parquet").num_row_groups == 24
    command = [
        sys.executable,
        str(SCRIPT),
        "--input_dir",
        str(hub),
        "--output_dir",
        str(tmp_path / "out"),
        "--num_workers",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, deadline = tmp_path / "out.partial/.conversion", time.monotonic() + 120
    while len(list(journal.glob("train-*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads((tmp_path / "out/conversion_report.json").read_text())
    assert report["images"] == {"train": 1200} and report["shards_reused"] >= 1
    assert "Went on from an interrupted run" in done.stdout
    source = open_splits(tmp_path / "out", None, "train", None, 1.0).train
    assert [source.encoded(i) for i in range(0, 1200, 97)] == [FILES[i % 20] for i in range(0, 1200, 97)]
