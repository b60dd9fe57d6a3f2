"""Every kind of data at `data_dir` is read, or the error names the command that makes it readable."""

import csv
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT
from src.data import dummy
from src.data.convert_scan import scan
from src.data.decode import BadImage
from src.data.latents import LatentWriter, write_index
from src.data.lists import open_list
from src.data.places import locate
from src.data.sources import DEFAULT_OPTIONS, ReadOptions, walk
from src.data.splits import Splits, open_evaluation, open_splits
from src.evaluation.images import open_images
from tests.test_data_sources import FILES, hf_dataset, tree
from tests.test_data_tars import tar
from tests.training import composed


def opened(
    path: Path | str, columns: ReadOptions = DEFAULT_OPTIONS, hf: bool | None = None, share: float = 1
) -> Splits:
    return open_splits(Path(path), hf, "train", "validation", share, columns)


def sizes(splits: Splits) -> tuple[int, int]:
    return len(splits.train_rows), len(splits.validation_rows)


def counts(path: Path | str, **options: Any) -> tuple[int, int]:
    return sizes(opened(path, **options))


def image_tar(path: Path, count: int) -> Path:
    samples = [((f"{i:04d}.jpg", FILES[i]), (f"{i:04d}.cls", b"%d" % (i % 3))) for i in range(count)]
    return tar(path, [member for sample in samples for member in sample])


def parquet(folder: Path, splits: tuple[str, ...] = ("train", "validation"), count: int = 6) -> Path:
    (folder / "data").mkdir(parents=True)
    for split in splits:
        for i in range(2):
            ending = "-596512b93331e41c" if split == "validation" else ""  # as datasets 2.14 names them
            rows = hf_dataset(2 * count).select(range(i * count, (i + 1) * count))
            rows.to_parquet(folder / f"data/{split}-{i:05d}-of-00002{ending}.parquet", batch_size=4)
    return folder


# -- kinds


def test_cache_of_load_dataset_and_a_single_arrow_file(tmp_path: Path) -> None:
    hub = parquet(tmp_path / "hub")
    loaded = datasets.load_dataset(str(hub), cache_dir=str(tmp_path / "cache"))
    cached = next((tmp_path / "cache").rglob("dataset_info.json")).parent
    splits = opened(cached)
    assert splits.kind == "cache of load_dataset"
    assert sizes(splits) == (12, 12)
    assert [splits.train.encoded(i) for i in range(12)] == FILES[:12]
    assert splits.train.class_names == ["cat", "dog"]
    assert [splits.train.label(i) for i in range(12)] == loaded["train"]["label"]
    arrow = next(cached.glob("*train*.arrow"))
    assert counts(arrow) == (12, 0)
    os.rename(arrow, tmp_path / "part.arrow")  # a single file, without its neighbours
    assert counts(tmp_path / "part.arrow") == (12, 0)
    assert opened(tmp_path / "part.arrow").train.class_names == ["cat", "dog"]


def test_tars_with_splits_in_their_names_or_folders(tmp_path: Path) -> None:
    timm = tmp_path / "timm"
    for i in range(2):
        image_tar(timm / f"imagenet1k-train-{i:04d}.tar", 4)
        image_tar(timm / f"imagenet1k-validation-{i:02d}.tar", 2)
    assert counts(timm) == (8, 4)
    assert [opened(timm).train.label(i) for i in range(4)] == [0, 1, 2, 0]
    assert counts(f"{timm}/imagenet1k-train-{{0000..0001}}.tar") == (8, 0)
    assert counts(f"{timm}/imagenet1k-train-*.tar", share=0.5) == (4, 4)
    assert counts(timm / "imagenet1k-train-0000.tar") == (4, 0)
    image_tar(tmp_path / "folders/train/0.tar", 3)
    image_tar(tmp_path / "folders/val/0.tar", 2)
    assert counts(tmp_path / "folders") == (3, 2)
    assert len(open_images(tmp_path / "folders", None, None).rows) == 2
    image_tar(timm / "more.tar", 2)
    with pytest.raises(UserError, match="1 of 5 files, such as more.tar, have no split"):
        opened(timm)
    with pytest.raises(UserError, match="train and validation; rename"):
        opened(image_tar(tmp_path / "x/train-val.tar", 2).parent)
    with pytest.raises(UserError, match=r"1 of 3 files are missing, such as .*0002.tar"):
        opened(f"{timm}/imagenet1k-train-{{0000..0002}}.tar")
    with pytest.raises(UserError, match="no file matches"):
        opened(f"{timm}/nothing-*.tar")


def test_metadata_of_img2dataset_is_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "laion"
    image_tar(folder / "00000.tar", 4)
    datasets.Dataset.from_dict({"url": ["http://x/a.jpg"], "caption": ["a"]}).to_parquet(folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    assert counts(folder) == (4, 0)
    (folder / "00000.tar").unlink()
    with pytest.raises(UserError, match="Parquet without images .columns of 00000.parquet: url, caption") as error:
        opened(folder)
    assert "--output_dir" not in str(error.value)
    (folder / "00000").mkdir()  # img2dataset's `files` format
    (folder / "00000/0.jpg").write_bytes(FILES[0])
    assert counts(folder) == (1, 0)


@pytest.mark.parametrize(
    ("name", "text", "columns", "expected"),
    [
        ("a.txt", "0.jpg\n1.jpg\n", ReadOptions(), (None, [None, None])),
        ("a.txt", "0.jpg 4\n1.jpg 0\n", ReadOptions(), (5, [4, 0])),
        ("a.csv", "path,label\n0.jpg,dog\n1.jpg,cat\n", ReadOptions(), (2, [1, 0])),
        ("a.csv", "n,picture,kind\n1,0.jpg,3\n2,1.jpg,\n", ReadOptions("picture", "kind"), (4, [3, -1])),
        ("a.tsv", "file_name\tlabel\n0.jpg\t1\n1.jpg\t0\n", ReadOptions(), (2, [1, 0])),
        ("a.jsonl", '{"image": "0.jpg", "label": 1}\n\n{"image": "1.jpg", "label": 0}\n', ReadOptions(), (2, [1, 0])),
        ("a.csv", "path,label\n0.jpg,10.0\n1.jpg,-1\n", ReadOptions(), (11, [10, -1])),
        (
            "a.jsonl",
            '{"image": "0.jpg", "label": 2.0}\n{"image": "1.jpg", "label": NaN}\n',
            ReadOptions(),
            (3, [2, -1]),
        ),
        ("a.csv", "url,label\nhttp://x/0.jpg,1\n", ReadOptions("url"), "lists URLs.*img2dataset"),
        ("a.csv", "a,b\n1,2\n", ReadOptions(), "columns a, b; expected one of path"),
        ("a.csv", "path\n0.jpg\n", ReadOptions(label="kind"), "data.label=kind.*no such column"),
        ("a.csv", "path,label\n,1\n", ReadOptions(), "entry 1 has no file name"),
        ("a.txt", "gone.jpg\n", ReadOptions(), "first image does not exist"),
        ("a.txt", "", ReadOptions(), "lists no images"),
        ("a.jsonl", "{", ReadOptions(), "can't be read as a list"),
        ("a.jsonl", "[1]\n", ReadOptions(), "line 1 is not a JSON object"),
    ],
)
def test_lists(name: str, text: str, columns: ReadOptions, expected: object, tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(FILES[i])
    (tmp_path / name).write_text(text)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            opened(tmp_path / name, columns=columns)
        return
    source = opened(tmp_path / name, columns=columns).train
    assert [source.encoded(i) for i in range(2)] == FILES[:2]
    assert (source.num_classes, [source.label(i) for i in range(2)]) == expected


def test_captions_of_a_list_are_not_kept_in_memory(tmp_path: Path) -> None:
    """The captions of ten million images would take 10 GB in each process."""
    (tmp_path / "0.jpg").touch()
    rows = ["path,caption,label", *(f"0.jpg,{i:02000},{i % 7}" for i in range(5000))]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    tracemalloc.start()
    source = open_list(tmp_path / "a.csv", None, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(source), source.num_classes) == (5000, 7) and peak < 0.2 * (tmp_path / "a.csv").stat().st_size


# -- image trees


def test_splits_in_subfolders_are_found_or_rejected_and_never_mixed(tmp_path: Path) -> None:
    kaggle = tmp_path / "kaggle"
    tree(kaggle / "ILSVRC/Data/CLS-LOC", "train", "val", "test", per_class=3)
    for split in ("train", "val"):
        (kaggle / "ILSVRC/Annotations/CLS-LOC" / split / "cat").mkdir(parents=True)
        (kaggle / "ILSVRC/Annotations/CLS-LOC" / split / "cat/0.xml").touch()
    for root in (kaggle, kaggle / "ILSVRC", kaggle / "ILSVRC/Data/CLS-LOC"):
        splits = opened(root)
        assert sizes(splits) == (6, 6)
        assert splits.train.class_names == ["cat", "dog"]
    tree(tmp_path / "only/imagenet", "train")
    assert counts(tmp_path / "only") == (8, 0)
    tree(kaggle / "more", "train", "val")
    with pytest.raises(UserError, match=r"mix validation into training.*data.data_dir=.*CLS-LOC"):
        opened(kaggle)
    beside = tmp_path / "beside"
    tree(beside / "imagenet", "train", "val")
    tree(beside / "sketches")
    with pytest.raises(UserError, match="images outside of it"):
        opened(beside)
    tree(tmp_path / "untrained", "val", "test")
    with pytest.raises(UserError, match=r"no split 'train'.*it has test, val"):
        opened(tmp_path / "untrained")
    classes = tree(tmp_path / "classes", "dog", "dev")  # one class is named like a split
    datasets.DatasetDict(train=hf_dataset(5)).save_to_disk(str(tmp_path / "dict"))
    test = tree(tmp_path / "only_test", "test")
    for folder, images in ((tmp_path / "untrained", 8), (classes, 16), (tmp_path / "dict", 5), (test, 8)):
        assert len(open_evaluation(folder, None)[0]) == len(open_images(folder, None, None).rows) == images, folder


@pytest.mark.parametrize(("train", "validation"), [("Train", "VAL"), ("train2017", "val2017"), ("training_256", "Dev")])
def test_split_folders_in_other_case_or_with_a_number(
    train: str, validation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(tmp_path / "coco/images", train, validation, per_class=3)
    for place in (root, tmp_path / "coco"):
        assert counts(place) == (6, 6)
        assert {name: len(rows) for name, rows in scan(place).splits.items()} == {"train": 6, "validation": 6}
    tree(root, "train_1")
    for read in (opened, scan):
        with pytest.raises(UserError, match=r"all mean the split 'train'.*data.hf_split="):
            read(root)
    splits = open_splits(root, False, train, "validation", 1.0)
    assert sizes(splits) == (6, 6)
    caplog.clear()
    tree(tmp_path / "vehicles", "train").joinpath("train/cat").rename(tmp_path / "vehicles/tram")
    opened(tmp_path / "vehicles")
    assert "left out: tram" in caplog.text
    (tmp_path / "vehicles/train").rename(tmp_path / "vehicles/Train")
    assert (
        opened(tmp_path / "vehicles").train.class_names
        == ["Train", "tram"]
        == list(scan(tmp_path / "vehicles").class_names)
    )


def test_folders_of_archivers_and_storage_are_not_classes(tmp_path: Path) -> None:
    root = tree(tmp_path / "set")
    for folder in ("__MACOSX/cat", "@eaDir/thumbs", "lost+found", "dog/@eaDir"):
        (root / folder).mkdir(parents=True)
        (root / folder / "0.jpg").write_bytes(b"x")
    splits = opened(root)
    assert splits.train.class_names == ["cat", "dog"] == list(scan(root).class_names or ())
    assert len(splits.train) == scan(root).count == 8
    tree(tmp_path / "zip/imagenet", "train", "val")
    (tmp_path / "zip/more").mkdir()
    (tmp_path / "zip/more/._0.jpg").write_bytes(b"x")
    assert counts(tmp_path / "zip") == (8, 8)


def test_links_pipes_and_devices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path / "set", "train", "val")
    plain = list(walk(root))
    (root / "train/cat/up").symlink_to("..")
    (root / "train/cat/top").symlink_to(root)
    (root / "train/cat/self").symlink_to("self")
    (root / "train/dog/down").symlink_to(root / "train/cat")
    (root / "train/loop").mkdir()
    (root / "train/loop/a").symlink_to("b")
    (root / "train/loop/b").symlink_to("a")
    os.mkfifo(root / "train/cat/pipe.jpg")
    (root / "train/cat/zero.jpg").symlink_to("/dev/zero")
    (root / "train/cat/gone.jpg").symlink_to("gone")
    assert sorted(walk(root)) == sorted(plain)
    splits = opened(root)
    assert sizes(splits) == (8, 8)
    assert "was read already" in caplog.text
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):  # a tree of links is read too
        (tmp_path / "linked" / name).symlink_to(root / "val" / name)
    assert counts(tmp_path / "linked") == (8, 0)


def test_file_names_can_not_forge_log_lines(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a\n2026-01-01 ERROR forged.jpg").write_bytes(b"")
    (tmp_path / "set/b\x1b[31m.jpg").write_bytes(b"")
    from tests.test_data_loader import module

    with pytest.raises(UserError) as error:
        list(module(tmp_path / "set", batch_size=2).train_dataloader())
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


# -- contradictions and suggested commands


def test_contradicting_use_hf_dataset_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dummy.write(tmp_path / "hf", 4)
    image_tar(tmp_path / "tars/0.tar", 2)
    tree(tmp_path / "tree")
    for folder, told, warned in (
        ("hf", True, 0), ("hf", False, 1), ("tree", False, 0), ("tree", True, 1), ("tars", None, 0), ("tars", True, 1),
    ):  # fmt: skip
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert counts(tmp_path / folder, hf=told)[0] > 0
        assert sum("use_hf_dataset" in r.getMessage() for r in caplog.records) == warned, (folder, told)


@pytest.mark.parametrize(
    ("make", "columns", "says"),
    [
        (lambda p: tree(p / "x"), ReadOptions(label="kind"), "data.label=kind: .*no columns. Set data.label=null"),
        (lambda p: tree(p / "x"), ReadOptions(image="low"), "data.image_column=low"),
        (lambda p: image_tar(p / "x/0.tar", 2).parent, ReadOptions(image="low"), "data.image_column=low"),
        (lambda p: image_tar(p / "x/0.tar", 2).rename(p / "x/0.tar.gz"), ReadOptions(), "compressed tar"),
        (lambda p: image_tar(p / "x/0.tar", 2).rename(p / "x/photo.jpg"), ReadOptions(), "is a file; expected"),
        (lambda p: Path("/dev/zero"), ReadOptions(), "neither a file nor a folder"),
    ],
)
def test_unreadable_data_dir_is_rejected(make: object, columns: ReadOptions, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        opened(make(tmp_path), columns=columns)  # type: ignore[operator]


def run_suggested_command(message: str) -> str:
    """Run the command that a message suggests; return the data_dir that it tells the user to set."""
    command = re.search(r"`(python .*?)`( and|\.)", message)
    assert command is not None, message
    words = shlex.split(command[1])
    words[:2] = [sys.executable, *([str(PROJECT_ROOT / words[1])] if words[1].endswith(".py") else [words[1]])]
    done = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stderr
    place = re.search(r"set data\.data_dir=(\S+?)\.?$", message.strip())
    assert place is not None, message
    return place[1]


@pytest.mark.parametrize("case", ["parquet", "paths", "text labels", "selection"])
def test_suggested_command_makes_the_data_readable(case: str, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(FILES[0])
    folder, columns = tmp_path / "set", ReadOptions()
    if case == "parquet":
        folder = parquet(tmp_path / "hub") / "data"
    elif case == "paths":
        datasets.Dataset.from_dict({"image": [str(tmp_path / "0.jpg")] * 3}).save_to_disk(str(folder))
    elif case == "text labels":
        hf_dataset(3).remove_columns("label").add_column("kind", ["x", "y", "x"]).save_to_disk(str(folder))
        columns = ReadOptions(label="kind")
    else:
        hf_dataset(3).save_to_disk(str(folder))
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(UserError) as error:
        opened(folder, columns=columns)
    if case == "selection":
        assert "flatten_indices" in str(error.value)
        return
    splits = opened(run_suggested_command(str(error.value)), columns=columns)
    assert splits.train.encoded(0) == FILES[0]
    assert splits.train.num_classes == (None if case == "paths" else 2)


def test_csv_with_quoted_file_names(tmp_path: Path) -> None:
    name = 'a, "b"\n.jpg'
    (tmp_path / name).write_bytes(FILES[0])
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path"], [name]])
    source = opened(tmp_path / "list.csv").train
    assert source.encoded(0) == FILES[0]
    (tmp_path / name).unlink()
    with pytest.raises(BadImage):
        source.encoded(0)


# -- docs/data.md


def kaggle(root: Path) -> Path:
    tree(root / "ILSVRC/Data/CLS-LOC", "train")
    (root / "ILSVRC/Data/CLS-LOC/val").mkdir()
    (root / "ILSVRC/Data/CLS-LOC/val/0.JPEG").write_bytes(FILES[0])
    return root / "ILSVRC"


def several_tars(root: Path, *names: str) -> Path:
    for name in names:
        image_tar(root / name, 4)
    return root


def cached(root: Path) -> Path:
    datasets.load_dataset(str(parquet(root / "hub")), cache_dir=str(root / "cache"))
    return next((root / "cache").rglob("dataset_info.json")).parent


def listed(root: Path) -> Path:
    (root / "0.jpg").write_bytes(FILES[0])
    (root / "list.csv").write_text("path\n0.jpg\n")
    return root / "list.csv"


def saved(root: Path) -> Path:
    datasets.DatasetDict(train=hf_dataset(8), validation=hf_dataset(4)).save_to_disk(str(root / "set"))
    return root / "set"


def stored(root: Path) -> Path:
    writer = LatentWriter(root / "latents", (8, 2, 2), torch.bfloat16, 0)
    writer.write(torch.randn(5, 8, 2, 2), torch.arange(5), torch.arange(5) % 2)
    facts = {"scale": "raw", "shape": [8, 2, 2], "encoder": {}, "statistics": None, "class_names": ["cat", "dog"]}
    write_index(root / "latents", writer.close(), facts)
    return root / "latents"


HELD = {
    "ImageNet from Kaggle": (kaggle, "/path/to/ILSVRC", (8, 1)),
    "ImageNet from the hub (Parquet)": (lambda p: parquet(p / "hub"), "/path/to/hub", (12, 12)),
    "timm's tars of ImageNet": (lambda p: several_tars(p, "imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"), "/path/to/imagenet-1k-wds", (4, 4)),
    "the output of img2dataset": (lambda p: several_tars(p, "00000.tar", "00001.tar"), "/path/to/img2dataset", (8, 0)),
    "BLIP3o, or any tars given by a pattern": (lambda p: several_tars(p, "0000.tar", "0001.tar"), "/path/to/blip3o", (8, 0)),
    "a dataset written by `save_to_disk`": (saved, "/path/to/dataset", (8, 4)),
    "the cache of `load_dataset`": (cached, "/path/to/cache/HASH", (12, 12)),
    "a folder of images": (lambda p: tree(p / "x", "train", "val"), "/path/to/images", (8, 8)),
    "a list of files (csv, tsv, jsonl, txt)": (listed, "/path/to/list.csv", (1, 0)),
    "a data set of tars on the hub": (lambda p: several_tars(p, "0.tar"), "hf:ORG/NAME", (4, 0)),
    "tars in a bucket": (lambda p: several_tars(p, "0.tar"), "s3://bucket/folder", (4, 0)),
    "latents from `reconstruct.py --latents` (stage 2)": (stored, "/path/to/out/latents", (5, 0)),
}  # fmt: skip
TABLE = dict(
    re.findall(r"^\| (.+?) \| (.*`) \|$", (PROJECT_ROOT / "docs/data.md").read_text().split("## Converting")[0], re.M)
)


def test_every_row_of_the_table_is_tested() -> None:
    assert set(TABLE) == set(HELD)


@pytest.mark.parametrize("row", HELD)
def test_command_in_the_table_opens_the_data(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shown, expected = HELD[row]
    folder = make(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    typed = [text.replace(shown, str(folder)) for text in re.findall(r"`([^`]+)`", TABLE[row])]
    if shown.startswith("s3://"):  # another fsspec storage, without a network
        typed = [TABLE[row].strip("`").replace(shown, f"file://{folder}")]
    elif shown.startswith("hf:"):
        typed = [TABLE[row].strip("`")]
    for line in typed[:-1]:
        words = shlex.split(line)
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, cwd=PROJECT_ROOT)
        assert done.returncode == 0, done.stderr
    place = composed(["experiment=rae_dino", *shlex.split(typed[-1])]).data.data_dir
    splits = open_splits(locate(place), None, "train", "validation", 1.0)
    assert sizes(splits) == expected
