"""Fingerprints of the data: what changes them, what does not, and how a resume compares them."""

import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.core.errors import UserError
from src.data import dummy
from src.data.datamodule import RAEDataModule
from src.data.fingerprint import compare_fingerprints
from tests.test_data_loader import module
from tests.test_data_places import image_tar
from tests.test_data_sources import tree


def make(kind: str, folder: Path) -> Path:
    if kind == "arrow":
        dummy.write(folder, 12, 3)
    elif kind == "tars":
        for i in range(3):
            image_tar(folder / f"{i}.tar", 6)
    else:
        tree(folder, "train", "val")
    return folder


def state(folder: Path, **changed: Any) -> dict[str, Any]:
    data = module(folder, batch_size=1, **changed)
    return pickle.loads(pickle.dumps(data.state_dict()))["fingerprint"]


def first_file(folder: Path) -> Path:
    return sorted(f for f in folder.rglob("*") if f.suffix in (".arrow", ".tar", ".JPEG") and "val" not in f.parts)[0]


def touch(folder: Path) -> None:
    for file in folder.rglob("*"):
        os.utime(file, (1, 1))


def replace_equal_size(folder: Path) -> None:
    file = first_file(folder)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(b ^ 0xFF for b in data[middle : middle + 8])
    file.write_bytes(data)


def rename(folder: Path) -> None:
    file = first_file(folder)
    file.rename(file.with_name("zzz" + file.suffix))


def add(folder: Path) -> None:
    file = first_file(folder)
    shutil.copy(file, file.with_name("new" + file.suffix))


@pytest.mark.parametrize("kind", ["arrow", "tars", "tree"])
def test_copied_moved_or_touched_data_keeps_its_fingerprint(kind: str, tmp_path: Path) -> None:
    folder = make(kind, tmp_path / "set")
    before = state(folder)
    assert compare_fingerprints(before, state(folder, seed=9)) == []
    shutil.copytree(folder, tmp_path / "copy")
    touch(tmp_path / "copy")
    assert compare_fingerprints(before, state(tmp_path / "copy")) == []
    (tmp_path / "deep").mkdir()
    folder.rename(tmp_path / "deep/moved")
    assert compare_fingerprints(before, state(tmp_path / "deep/moved")) == []


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("arrow", replace_equal_size, "training: data-00000-of-00003.arrow changed"),
        ("tars", replace_equal_size, "training: 0.tar changed"),
        ("tars", rename, "0.tar is gone|zzz.tar is new"),
        ("tars", add, "new.tar is new"),
        ("tree", replace_equal_size, "training: cat changed"),
        ("tree", rename, "training: cat changed"),
        ("tree", add, r"training: cat changed \(4, now 5\)"),
        ("tree", lambda f: shutil.rmtree(f / "val"), "evaluation: gone"),
        ("tree", lambda f: (f / "val/cat/0.JPEG").write_bytes(b"other"), "evaluation: cat changed"),
    ],
)
def test_changed_data_is_named_and_rejected(
    kind: str, change: Callable[[Path], Any], says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(kind, tmp_path / "set")
    stored = module(folder, batch_size=1).state_dict()
    change(folder)
    with pytest.raises(UserError, match=f"differs from that of the checkpoint: .*({says}).*allow_changed"):
        module(folder, batch_size=1).load_state_dict(stored)
    with caplog.at_level(logging.WARNING):
        module(folder, batch_size=1, allow_changed=True).load_state_dict(stored)
    assert sum("differs from that of the checkpoint" in r.getMessage() for r in caplog.records) == 1


def test_train_split_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = make("arrow", tmp_path / "set")
    changes = compare_fingerprints(state(folder, train_split=0.5), state(folder, train_split=0.75))
    assert changes == ["rows.evaluation: 6, now 3", "rows.training: 6, now 9"]


def test_resume_without_a_fingerprint_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make("arrow", tmp_path / "set")

    class Trainer:
        ckpt_path, world_size, global_rank, num_devices = "last.ckpt", 1, 0, 1

        class strategy:
            class root_device:
                type = "cpu"

    def loaders(data: RAEDataModule) -> int:
        data.trainer = Trainer()  # type: ignore[assignment]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            data.train_dataloader()
            data.train_dataloader()
        return sum("no fingerprint" in r.getMessage() for r in caplog.records)

    assert loaders(module(folder)) == 1
    compared = module(folder)
    compared.load_state_dict(module(folder).state_dict())
    assert loaders(compared) == 0


def test_number_of_fingerprinted_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(600):
            (folder / name / f"{i}.jpg").write_bytes(b"x" * 20)
    reads = []
    monkeypatch.setattr("src.data.fingerprint._ranges", lambda file: reads.append(file) or "")
    entries = state(folder)["sources"]["training"]["files"]
    assert len(reads) == 512 and set(entries) == {"cat", "dog"}
