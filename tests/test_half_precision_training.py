"""fp16 with loss scaling, as on a GPU; a CPU can do it too, slowly, and the program never asks it to."""

import logging

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision

from src.training import trainer as trainer_of_a_run
from tests.training import train

QUIET = ["~callbacks.rfid", "logger=csv", "callbacks.checkpoint.every_n_steps=1", "model.disc_weight=0.75"]


def with_scaler(monkeypatch, scale: float) -> None:
    """Training in fp16 whose loss scale starts at `scale`."""
    monkeypatch.setattr(
        pl.trainer.connectors.accelerator_connector._AcceleratorConnector,
        "_check_and_init_precision",
        lambda self: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale)),
    )


def test_both_networks_learn_in_fp16(monkeypatch, tmp_path):
    with_scaler(monkeypatch, 2.0**10)
    run = train(tmp_path, *QUIET)
    assert run.trainer.precision == "16-mixed" and run.module.disc_scaler.is_enabled()
    assert torch.float16 in {p.dtype for p in run.module.rae.encoder.parameters()}
    for optimizer, steps in zip(run.trainer.optimizers, (6, 5), strict=True):
        states = list(optimizer.state.values())
        assert states and all(float(state["step"]) == steps for state in states)
        assert all(state["exp_avg_sq"].isfinite().all() for state in states)
        assert sum(float(state["exp_avg_sq"].sum()) for state in states) > 0


@pytest.mark.slow
def test_a_loss_scale_too_high_is_lowered_and_no_reason_to_stop(monkeypatch, tmp_path):
    """Overflow inside LPIPS makes the adaptive weight a NaN: of the scaler's making, and the scaler skips the step."""
    with_scaler(monkeypatch, 2.0**24)
    run = train(tmp_path, *QUIET)
    assert run.trainer.global_step == 6 and run.module.nonfinite.skipped == 0
    assert run.trainer.precision_plugin.scaler.get_scale() < 2.0**24
    assert all(value.isfinite().all() for value in run.module.state_dict().values())


@pytest.mark.parametrize(("slowdown", "warned"), [(2.0, True), (0.5, False)])
def test_bf16_on_a_cpu_that_has_no_instructions_for_it(monkeypatch, caplog, slowdown, warned):
    monkeypatch.setattr(trainer_of_a_run, "bf16_slowdown_on_cpu", lambda: slowdown)
    with caplog.at_level(logging.WARNING):
        assert trainer_of_a_run.precision("bf16", on_gpu=False) == "bf16-mixed"
        assert trainer_of_a_run.precision("16", on_gpu=False) == "bf16-mixed"
        assert trainer_of_a_run.precision("bf16", on_gpu=True) == "bf16-mixed"
    assert [r.message.count("trainer.precision=32 is faster") for r in caplog.records] == [1, 1] * warned


def test_the_slowdown_is_the_ratio_of_the_shortest_times(monkeypatch):
    """Four products each: bf16 takes 9, 6, 7, 8 s by this clock, float32 5, 3, 2, 4."""
    ticks = [moment for taken in (9, 6, 7, 8, 5, 3, 2, 4) for moment in (0, taken)]
    monkeypatch.setattr(trainer_of_a_run.time, "perf_counter", iter(ticks).__next__)
    assert trainer_of_a_run.bf16_slowdown_on_cpu(8) == 3.0
