"""Rows of Hugging Face datasets and image trees, the guide's two ways to split, and errors for missing or damaged data."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from src.core.errors import UserError
from src.core.files import PROJECT_ROOT
from src.data import dummy
from src.data.arrow import ArrowSource
from src.data.arrow_writer import write_metadata
from src.data.decode import BadImage
from src.data.file_names import VALIDATION_SPLITS
from src.data.sources import ReadOptions, open_image_tree
from src.data.splits import open_splits
from src.evaluation.images import open_images

FILES = [dummy.jpeg(i) for i in range(20)]
datasets.disable_progress_bars()


def hf_dataset(count: int) -> datasets.Dataset:
    images = [{"bytes": FILES[i % 20], "path": f"{i}.jpg"} for i in range(count)]
    rows = {"image": images, "label": [i % 2 for i in range(count)]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    hf_dataset(20).save_to_disk(str(tmp_path / "single"), num_shards=3)
    return tmp_path / "single"


@pytest.fixture
def with_splits(tmp_path: Path) -> Path:
    datasets.DatasetDict(train=hf_dataset(20), validation=hf_dataset(6)).save_to_disk(str(tmp_path / "splits"))
    return tmp_path / "splits"


def tree(root: Path, *splits: str, per_class: int = 4) -> Path:
    for split in splits or ("",):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                (root / split / name / f"{i}.JPEG").write_bytes(FILES[i])
    return root


def test_rows_equal_what_datasets_reads(single: Path, tmp_path: Path) -> None:
    reference = datasets.load_from_disk(str(single)).cast_column("image", datasets.Image(decode=False))
    for source in (ArrowSource(single), pickle.loads(pickle.dumps(ArrowSource(single)))):
        assert len(source) == 20
        assert source.class_names == ["cat", "dog"]
        for i in (0, 6, 7, 13, 19):
            assert bytes(source.encoded(i)) == reference[i]["image"]["bytes"]
            assert source.label(i) == reference[i]["label"]
            assert f"{i}.jpg" in source.name(i)
        for i in (-1, 20):
            with pytest.raises(IndexError):
                source.encoded(i)
    assert ArrowSource(single).fingerprint() == source.fingerprint()
    hf_dataset(19).save_to_disk(str(tmp_path / "other"))
    assert ArrowSource(tmp_path / "other").fingerprint() != source.fingerprint()


def test_our_own_sets_load_with_datasets(tmp_path: Path) -> None:
    dummy.write(tmp_path / "own", 10, 2)
    loaded = datasets.load_from_disk(str(tmp_path / "own"))
    assert loaded.features["label"].names == list(dummy.CLASSES)
    source = ArrowSource(tmp_path / "own")
    assert [bytes(source.encoded(i)) for i in range(10)] == [dummy.jpeg(i) for i in range(10)]
    assert loaded[9]["label"] == source.label(9) and len(source) == len(loaded) == 10
    assert not dummy.write(tmp_path / "own", 10, 2)  # an existing dataset is kept
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


def test_rows_with_a_path_only_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(FILES[0])
    paths = [str(tmp_path / "a.jpg"), "../a.jpg", "gone.jpg", None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": None, "path": path} for path in paths] + [None], kind)})
    folder = tmp_path / "paths"
    folder.mkdir()
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    write_metadata(folder, ["data.arrow"], None, "train")
    source = ArrowSource(folder)
    assert bytes(source.encoded(0)) == bytes(source.encoded(1)) == FILES[0]
    assert source.label(0) is None
    for i in (2, 3, 4):
        with pytest.raises(BadImage):
            source.encoded(i)
    # `datasets` reads it too
    assert datasets.load_from_disk(str(folder))[0]["image"].size


def test_image_column_is_found_under_any_name(tmp_path: Path) -> None:
    hf_dataset(4).rename_column("image", "picture").save_to_disk(str(tmp_path / "another name"))
    assert bytes(ArrowSource(tmp_path / "another name").encoded(2)) == FILES[2]
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no image column.*text .string., label"):
        ArrowSource(tmp_path / "none")


@pytest.mark.parametrize(
    ("values", "kind", "wanted", "labels", "count"),
    [
        ([1, 0, None], datasets.ClassLabel(names=["a", "b", "c"]), None, [1, 0, -1], 3),
        ([4, 0, 2], datasets.Value("int16"), None, [4, 0, 2], 5),
        (["x", "y", "x"], datasets.Value("string"), None, [None] * 3, None),
        ([[1], [2, 3], []], datasets.List(datasets.Value("int64")), None, [None] * 3, None),
        ([4, 0, 2], datasets.Value("int64"), "kind", [4, 0, 2], 5),
        (["x", "y", "x"], datasets.Value("string"), "kind", "string in that column.*: other.*class_encode", None),
        ([1, 2, 3], datasets.Value("int64"), "sort", "no such column.*kind, other", None),
    ],
)
def test_label_columns(values: list, kind: object, wanted: str | None, labels: object, count: int | None, tmp_path: Path) -> None:  # fmt: skip
    column = "label" if wanted is None else "kind"
    rows = {"image": [{"bytes": FILES[i], "path": None} for i in range(3)], column: values, "other": [7, 8, 9]}
    kinds = {"image": datasets.Image(), column: kind, "other": datasets.Value("int32")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(str(tmp_path / "set"))
    if isinstance(labels, str):
        with pytest.raises(UserError, match=f"(?s)data.label={wanted}.*{labels}"):
            ArrowSource(tmp_path / "set", ReadOptions(label=wanted))
        return
    source = pickle.loads(pickle.dumps(ArrowSource(tmp_path / "set", ReadOptions(label=wanted))))
    assert [source.label(i) for i in range(3)] == labels
    assert source.num_classes == count


def test_image_tree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path / "t")
    (root / "cat/deep").mkdir()
    (root / "cat/deep/x.png").write_bytes(FILES[0])
    (root / "cat/notes.txt").write_text("no image")
    (root / "dog/.hidden.jpg").write_bytes(FILES[0])
    source = open_image_tree(root)
    assert len(source) == 9
    assert source.class_names == ["cat", "dog"]
    assert [source.label(i) for i in range(9)] == [0] * 5 + [1] * 4
    assert source.encoded(0) == FILES[0]
    (root / "dog/3.JPEG").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.encoded(8)
    os.mkfifo(root / "dog/3.JPEG")
    with pytest.raises(BadImage, match="not a regular file"):
        source.encoded(8)
    (root / "dog/3.JPEG").rename(root / "dog/4.JPEG")
    assert open_image_tree(root).fingerprint() != source.fingerprint() and not caplog.text
    (root / "beside.jpg").write_bytes(FILES[0])
    assert len(open_image_tree(root)) == 8 and "1 images outside its class folders" in caplog.text
    flat = tmp_path / "flat"
    flat.mkdir()
    with pytest.raises(UserError, match="No images"):
        open_image_tree(flat)
    (flat / "1.jpg").write_bytes(FILES[1])
    source = open_image_tree(flat)
    assert (len(source), source.class_names, source.label(0)) == (1, None, None)


def sizes(path: Path, use_hf: bool, share: float, validation: str | None = "validation") -> tuple[int, int]:
    splits = open_splits(path, use_hf, "train", validation, share)
    return len(splits.train_rows), len(splits.validation_rows)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs /proc")
def test_workers_share_the_file_names_of_an_image_tree() -> None:
    """A list of names would be copied into each worker page by page: 120 MB each for ImageNet."""
    program = (
        "import os; from pathlib import Path; from src.data.sources import FileSource\n"
        "source = FileSource(Path('.'), [f'{i:080}' for i in range(200_000)])\n"
        "def own(): return int(open('/proc/self/smaps_rollup').read().split('Private_Dirty:')[1].split()[0])\n"
        "if os.fork():\n    raise SystemExit(os.wait()[1])\n"
        "before = own()\n"
        "for i in range(200_000): assert int(source.member(i)) == i\n"
        "print(own() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT_ROOT, text=True, capture_output=True, check=True)
    assert int(done.stdout) < 5000  # kB; as a list 25,000


def test_both_ways_to_split_of_the_guide(with_splits: Path, single: Path, tmp_path: Path) -> None:
    """1: train and validation splits. 2: one split, of which training takes a share."""
    assert [sizes(with_splits, True, share) for share in (1.0, 0.5)] == [(20, 6), (10, 6)]
    assert sizes(with_splits, True, 0.8, validation=None) == (16, 4)
    assert sizes(tree(tmp_path / "t", "train", "val", per_class=3), False, 1.0) == (6, 6)
    with pytest.raises(UserError, match=r"no split 'small'.*train, validation"):
        open_splits(with_splits, True, "small", "validation", 1.0)
    assert [sizes(single, True, share) for share in (0.8, 1.0)] == [(16, 4), (20, 0)]
    splits = open_splits(single, True, "train", "validation", 0.8)
    assert not set(splits.train_rows) & set(splits.validation_rows)
    assert open_splits(single, True, "train", "validation", 1.0).validation is None
    assert sizes(tree(tmp_path / "a"), False, 0.75) == sizes(tree(tmp_path / "b", "train"), False, 0.75) == (6, 2)


@pytest.mark.parametrize("name", VALIDATION_SPLITS)
def test_validation_split_may_be_given_by_any_of_its_names(name: str, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": hf_dataset(8), name: hf_dataset(6)}).save_to_disk(str(tmp_path / "hf"))
    tree(tree(tmp_path / "tree", "train"), name, per_class=3)
    for folder in (tmp_path / "hf", tmp_path / "tree"):
        for asked in VALIDATION_SPLITS:
            assert sizes(folder, folder.name == "hf", 1.0, asked) == (8, 6)
            assert len(open_images(folder, asked, None).rows) == 6
        assert len(open_images(folder, None, None).rows) == 6


@pytest.mark.parametrize(
    ("train", "validation", "named"),
    [
        ("train_small", "val", "validation"),
        ("train_small", "validation", "val"),
        ("train_small", "held_back", "held_back"),
        ("training", "val", "val"),
        ("train", "held_back", "held_back"),
    ],
)
def test_split_folders_are_chosen_by_name(train: str, validation: str, named: str, tmp_path: Path) -> None:
    root = tree(tmp_path / "t", train, per_class=5)
    tree(root, validation, per_class=2)
    tree(root, "test", per_class=1)
    splits = open_splits(root, False, train, named, 1.0)
    assert (len(splits.train_rows), len(splits.validation_rows)) == (10, 4)
    assert splits.train.class_names == splits.validation.class_names == ["cat", "dog"]
    training = {"data_dir": str(root), "hf_split": train, "hf_validation_split": named, "train_split": 1.0}
    for split in (None, validation, named):
        assert len(open_images(root, split, training).rows) == 4
    assert open_images(root, None, training).split == validation
    assert len(open_images(root, "all", training).rows) == len(open_images(root, train, training).rows) == 10
    # without a known training set, a requested split is the folder of that name
    assert [len(open_images(root, name, None).rows) for name in (train, validation, "test")] == [10, 4, 2]
    with pytest.raises(UserError, match="no split 'nothing'"):
        open_images(root, "nothing", training)


def test_other_data_than_that_of_the_training_uses_its_own_folders(tmp_path: Path) -> None:
    training = {"data_dir": "gone", "hf_split": "train_small", "hf_validation_split": "val_small", "train_split": 0.5}
    usual = tree(tree(tmp_path / "usual", "train", per_class=5), "val", per_class=2)
    assert len(open_images(usual, None, training).rows) == 4
    assert len(open_images(usual, "all", training).rows) == 10
    classes = tree(tmp_path / "classes")  # one class is named like a split
    tree(classes / "val")
    assert open_splits(classes, False, "train", "validation", 1.0).validation is None
    assert len(open_images(classes, "all", None).rows) == 16


def trained_on(folder: object, share: float) -> dict[str, object]:
    """Return the `data` config of a run on the usual splits."""
    return {"data_dir": str(folder), "hf_split": "train", "hf_validation_split": "validation", "train_split": share}


def test_images_held_out_of_training_are_scored(tmp_path: Path) -> None:
    images, elsewhere = tree(tmp_path / "images"), trained_on(tree(tmp_path / "tree", "train", "val"), 0.75)
    for split, training, expected in (
        (None, trained_on(images, 0.75), ("held_out", 2)),
        ("all", trained_on(images, 0.75), ("all", 8)),
        (None, elsewhere, ("all", 8)),  # the training data exists and is not this
        (None, trained_on("/not/here", 0.75), ("held_out", 2)),  # this may be a copy of the training data
        ("held_out", elsewhere, ("held_out", 2)),
        (None, None, ("all", 8)),
    ):
        found = open_images(images, split, training)
        assert (found.split, len(found.rows)) == expected, (split, training)
    for i in range(99):
        (images / f"class{i}").mkdir()
    with pytest.raises(UserError, match=r"^.{,300}no split 'test': it has cat, .*, …\. Use"):
        open_images(images, "test", None)


@pytest.mark.parametrize(
    ("splits", "share", "scored", "held_out"),
    [
        ("train validation test", 0.5, "validation", 3),
        ("train val", 0.5, "val", 3),
        ("train test", 0.5, "held_out", 4),
        ("train test", 1.0, "test", 0),  # not held out of training's data
        ("", 1.0, "all", 0),
    ],
)
def test_training_and_evaluation_hold_out_the_same_rows_of_hf_datasets(
    splits: str, share: float, scored: str, held_out: int, tmp_path: Path
) -> None:
    parts = {name: hf_dataset(8 if name == "train" else 3) for name in splits.split()}
    (datasets.DatasetDict(parts) if parts else hf_dataset(11)).save_to_disk(str(tmp_path / "set"))
    found = open_images(tmp_path / "set", None, trained_on(tmp_path / "set", share))
    rows = open_splits(tmp_path / "set", True, "train", "validation", share).validation_rows
    assert (found.split, len(rows)) == (scored, held_out)
    assert not held_out or len(found.rows) == held_out
    assert len(open_images(tmp_path / "set", "train" if parts else None, None).rows) == (8 if parts else 11)


def made(folder: Path, file: str) -> Path:
    (folder / file).parent.mkdir(parents=True)
    (folder / file).touch()
    return folder


def arrow(path: Path, number: int) -> Path:
    return sorted(path.glob("*.arrow"))[number]


# fmt: off
DAMAGED = {  # damage to a dataset of three Arrow files, and the error
    "no dataset_info": (lambda p: (p / "dataset_info.json").unlink(), "No such file.*dataset_info.json.*half-"),
    "no state": (lambda p: (p / "state.json").unlink(), "No such file.*state.json.*half-"),
    "bytes behind its end": (lambda p: arrow(p, 1).open("ab").write(bytes(64)), "data-00001.*cut short or damaged: its stream ends at byte"),
    "lost shard": (lambda p: arrow(p, 2).unlink(), "lacks 1 of its 3 Arrow files: data-00002"),
    "half JSON": (lambda p: (p / "state.json").write_text('{"_data_files": ['), "state.json is not readable as JSON.*half-"),
    "no object": (lambda p: (p / "state.json").write_text("[]"), "state.json holds a JSON list"),
    "no shards": (lambda p: (p / "state.json").write_text(json.dumps({"_data_files": []})), "no Arrow files"),
}
ELSEWHERE = {  # what is given instead of a dataset, and the error
    "nothing": (lambda p: p / "nothing_here", "No dataset at .*data.data_dir.*create_hf_test_data.py"),
    "something else": (lambda p: made(p / "other", "deep/notes.txt"), "No images in .*deep/notes.txt"),
    "packed files": (lambda p: made(p / "packed", "train.tar.gz"), "holds archives, such as train.tar.gz. Unpack"),
    "empty folder": (lambda p: made(p / "empty", ".hidden/x").parent / "empty", "is empty.*--output_dir .*empty`"),
    "a file": (lambda p: p / "state.json", "is a file"),
    "one up": (lambda p: p.parent, "data.data_dir=.*single"),
    "misspelt": (lambda p: p.parent / "singel", "Folders in .*: single"),
}
# fmt: on


@pytest.mark.parametrize("case", [*DAMAGED, *ELSEWHERE])
def test_damaged_or_missing_dataset_is_an_error(case: str, single: Path) -> None:
    change, says = (DAMAGED | ELSEWHERE)[case]
    folder = change(single)
    with pytest.raises(UserError, match=f"(?s){says}") as error:
        open_splits(single if case in DAMAGED else folder, True, "train", "validation", 1.0)
    assert "--overwrite" not in str(error.value)  # what lies there may be the only copy of the images


def test_nothing_to_train_on(single: Path) -> None:
    with pytest.raises(UserError, match="data.train_split=0.01 leaves none"):
        open_splits(single, True, "train", None, 0.01)
