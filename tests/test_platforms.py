"""What Windows and macOS lack or do differently, simulated: none of this has run there."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src.callbacks import progress
from src.core import files
from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT
from src.data.places import locate
from src.models.frozen_encoder import check_source
from src.training.trainer import _accelerator
from tests.training import SMALL, python

WITHOUT = """
import contextlib, os, sys
with contextlib.suppress(ImportError):
    import psutil  # which on Linux needs resource
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("pread", "posix_fadvise"):
    delattr(os, name)
"""
TRAIN = """
import runpy, signal, sys
import pytorch_lightning, torch.distributed.elastic.timer  # which on Linux need the signals
from src.data.loader import WorkerOptions
WorkerOptions.__init__.__defaults__ = (*WorkerOptions.__init__.__defaults__[:-1], "spawn")
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGPIPE", "SIGBUS"):
    delattr(signal, name)
if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path("src/train.py", run_name="__main__")
"""


def test_run_without_fcntl_resource_fork_and_most_signals(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)  # in workers too
    (tmp_path / "start.py").write_text(TRAIN)
    light = ["~callbacks.rfid", "model.disc_weight=0", "model.perceptual_weight=0", "data.train_split=1.0"]
    words = [*SMALL, *light, "data.num_workers=1", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
    path = f"{tmp_path}:{PROJECT_ROOT}"
    python(tmp_path / "start.py", "src/train.py", *words, f"paths.log_dir={tmp_path}/logs", PYTHONPATH=path)
    (folder,) = tmp_path.glob("logs/runs/*/*")
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert "Total length" not in str(record["warnings"])  # Lightning's warning that nothing is held out
    assert (folder / "checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize(("times", "read"), [(3, "new"), (1000, "old")])
def test_replacing_a_file_that_is_being_read_is_retried(tmp_path, monkeypatch, times, read):
    file, failures, replace = tmp_path / "run.json", [], os.replace
    file.write_text("old")

    def busy(source, target):
        if len(failures) < times:
            failures.append(target)
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        replace(source, target)

    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "replace": busy}))
    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=lambda seconds: None))
    if read == "old":
        with pytest.raises(PermissionError):
            files.write_text(file, "new")
    else:
        files.write_text(file, "new")
    assert file.read_text() == read and [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("path", ["C:\\models\\dinov2", "C:/models/dinov2", "models\\dinov2"])
def test_windows_paths_are_not_hub_ids_or_urls(path):
    with pytest.raises(UserError, match="there is no folder"):
        check_source("Dinov2withNorm", path)
    assert isinstance(locate(path), Path)


def test_memory_is_bytes_on_macos_and_unknown_without_resource(monkeypatch):
    usage = SimpleNamespace(ru_maxrss=10**6)
    cpu, one = torch.device("cpu"), SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setitem(sys.modules, "resource", one)
    monkeypatch.setattr(sys, "platform", "linux")
    assert progress.peak_memory_gb(cpu) == pytest.approx(1.024)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert progress.peak_memory_gb(cpu) == pytest.approx(0.001)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert progress.peak_memory_gb(cpu) == 0


def test_mps_is_accepted_if_torch_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (_accelerator("mps"), _accelerator("auto")) == ("mps", "cpu")
    with pytest.raises(UserError, match=r"trainer\.accelerator=mps"):
        _accelerator("gpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="no MPS.*trainer=cpu"):
        _accelerator("mps")
