"""Training in fp16 with loss scaling, as on a GPU. A CPU can do it too, slowly; the training script never does."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision

from tests.training import last, train

QUIET = ["~callbacks.rfid", "logger=csv", "callbacks.checkpoint.every_n_steps=1", "model.disc_weight=0.75"]


def with_scaler(monkeypatch, scale: float) -> None:
    """Make training use fp16 with a loss scale that starts at `scale`."""
    monkeypatch.setattr(
        pl.trainer.connectors.accelerator_connector._AcceleratorConnector,
        "_check_and_init_precision",
        lambda self: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale)),
    )


def test_both_networks_learn_in_fp16(monkeypatch, tmp_path):
    with_scaler(monkeypatch, 2.0**10)
    train(tmp_path, *QUIET, "trainer.max_epochs=1")
    run = train(tmp_path, *QUIET, checkpoint=last(tmp_path))
    scalers = run.trainer.precision_plugin.scaler, run.module.disc_scaler
    assert [scaler.state_dict()["_growth_tracker"] for scaler in scalers] == [6, 5]  # counted across the resume
    assert run.trainer.precision == "16-mixed" and run.module.disc_scaler.is_enabled()
    assert torch.float16 in {p.dtype for p in run.module.rae.encoder.parameters()}
    for optimizer, steps in zip(run.trainer.optimizers, (6, 5), strict=True):
        states = list(optimizer.state.values())
        assert states and all(float(state["step"]) == steps for state in states)
        assert all(state["exp_avg_sq"].isfinite().all() for state in states)
        assert sum(float(state["exp_avg_sq"].sum()) for state in states) > 0


@pytest.mark.slow
def test_loss_scale_that_is_too_high_is_lowered_and_training_continues(monkeypatch, tmp_path):
    """Overflow inside LPIPS makes the adaptive weight NaN: the loss scale causes it, and the scaler skips the step."""
    with_scaler(monkeypatch, 2.0**24)
    run = train(tmp_path, *QUIET)
    assert run.trainer.global_step == 6 and run.module.nonfinite.skipped == 0
    assert run.trainer.precision_plugin.scaler.get_scale() < 2.0**24
    assert all(value.isfinite().all() for value in run.module.state_dict().values())
