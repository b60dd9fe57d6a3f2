"""The preflight checks what training would, times each phase of the run, and leaves nothing behind."""

import itertools
import logging
import re
from types import SimpleNamespace
from unittest.mock import PropertyMock, patch

import pytest
import torch

from src.core.distributed import Launch
from src.core.errors import UserError
from src.training import preflight as preflight_module
from src.training.preflight import gpu_memory, loader_seconds, preflight
from src.training.run import build_run
from src.training.stage1 import RAEModule
from src.training.stage1_step import Phase
from tests.training import SMALL, composed


def run_preflight(folder, *overrides):
    config = composed([*SMALL, f"paths.log_dir={folder}", *overrides])
    run = build_run(config, Launch(0, 1, "single"), bare=True)
    preflight(run)
    return run


def test_it_reports_every_stretch_and_writes_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run_preflight(tmp_path, "trainer.max_epochs=4", "model.disc_upd_start_epoch=1", "model.disc_start_epoch=2")
    report = next(record.getMessage() for record in caplog.records if "Preflight passed" in record.getMessage())
    loss_phases = ("L1 + LPIPS  ", "L1 + LPIPS + D  ", "L1 + LPIPS + D + GAN", "3 steps at", "6 steps at")
    for words in (*loss_phases, "12 in all", "device-hours"):
        assert words in report, report
    assert not list(tmp_path.iterdir())


def test_forecast_follows_a_loader_slower_than_an_update(tmp_path, monkeypatch, caplog):
    """Prefetched batches would hide it from the few updates that are timed."""
    monkeypatch.setattr(preflight_module, "loader_seconds", lambda loader, workers: 7.0)
    with caplog.at_level(logging.INFO):
        halves = ["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=4"]
        run_preflight(tmp_path, "model.disc_weight=0", *halves)
    report = next(record.getMessage() for record in caplog.records if "Preflight passed" in record.getMessage())
    assert re.search(r"loader +0\.5714 images/s by itself", report)
    assert re.search(r"3 steps at 14 s \(0\.5714 images/s, peak .* GB, [\d.]+ s without waiting for data\)", report)


def test_loader_is_timed_after_its_prefetched_batches(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(preflight_module, "time", SimpleNamespace(perf_counter=lambda: now.seconds))

    def loader(ahead, seconds):
        for number in itertools.count():
            now.seconds += 5.0 if number == 0 else 0.0 if number < ahead else seconds
            yield number

    assert loader_seconds(loader(8, 0.1), workers=2) == pytest.approx(0.1)
    assert loader_seconds(loader(0, 4.0), workers=2) == pytest.approx(4.0)  # ends after half a minute
    assert loader_seconds(itertools.islice(loader(0, 4.0), 1), workers=2) == pytest.approx(5.0)


def test_gpu_memory_of_other_processes(monkeypatch):
    assert gpu_memory(torch.device("cpu")) == []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * 10**9)
    ((name, text),) = gpu_memory(torch.device("cuda"))
    assert name == "GPU memory" and text.startswith("80.0 GB, 40.0 GB of it used by other processes")


def test_callbacks_are_checked_though_none_is_called(tmp_path):
    with pytest.raises(UserError, match="callbacks.rfid.rfid_num_samples=1: expected"):
        run_preflight(tmp_path, "callbacks.rfid.rfid_num_samples=1")


def test_too_little_disk_space_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10**6})())
    with pytest.raises(UserError, match=r"GB free\. Set paths\.log_dir"):
        run_preflight(tmp_path)


def test_stretches_cut_the_run_where_a_loss_starts():
    starts = [f"model.{key}_start_epoch={epoch}" for key, epoch in {"lpips": 1, "disc_upd": 2, "disc": 3}.items()]
    run = build_run(composed([*SMALL, *starts]), Launch(0, 1, "single"), bare=True)
    steps_per_epoch = PropertyMock(return_value=10)
    with patch.object(RAEModule, "steps_per_epoch", steps_per_epoch):
        assert [part[1:] for part in run.module.loss_phases(planned=50)] == [
            (10, Phase(False, False, False)), (10, Phase(True, False, False)), (10, Phase(True, False, True)), (20, Phase(True, True, True)),
        ]  # fmt: skip
        assert [steps for _, steps, _ in run.module.loss_phases(planned=15)] == [10, 5]
