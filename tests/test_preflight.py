"""The preflight checks what training would, times each stretch of the run, and leaves nothing behind."""

import logging
from unittest.mock import PropertyMock, patch

import pytest

from src.core.distributed import Launch
from src.core.errors import UserError
from src.training.preflight import preflight
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
    for words in (
        "L1 + LPIPS  ",
        "L1 + LPIPS + D  ",
        "L1 + LPIPS + D + GAN",
        "3 steps at",
        "6 steps at",
        "12 in all",
        "device-hours",
    ):
        assert words in report, report
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.data_dir=data/nowhere"], "data/nowhere"),
        (["data.batch_size=1000"], "training images"),
        (["model.disc_arch.arch.weights=pretrained"], "dino_ckpt_path"),
        (["callbacks.rfid.rfid_every_epoch=true", "callbacks.rfid.inception_weights=pretrained"], "inception"),
    ],
)
def test_it_finds_what_would_stop_training(tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        run_preflight(tmp_path, *overrides)


def test_too_little_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10**6})())
    with pytest.raises(UserError, match=r"GB free\. Set paths\.log_dir"):
        run_preflight(tmp_path)


def test_stretches_cut_the_run_where_a_loss_starts():
    run = build_run(
        composed([*SMALL, "model.lpips_start_epoch=1", "model.disc_upd_start_epoch=2", "model.disc_start_epoch=3"]),
        Launch(0, 1, "single"),
        bare=True,
    )
    steps_per_epoch = PropertyMock(return_value=10)
    with patch.object(RAEModule, "steps_per_epoch", steps_per_epoch):
        assert [part[1:] for part in run.module.stretches(planned=50)] == [
            (10, Phase(False, False, False)), (10, Phase(True, False, False)), (10, Phase(True, False, True)), (20, Phase(True, True, True)),
        ]  # fmt: skip
        assert [steps for _, steps, _ in run.module.stretches(planned=15)] == [10, 5]
