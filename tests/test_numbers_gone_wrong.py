"""NaN and infinity: which term, at which step, how often, and what is left of the weights."""

import math
from types import SimpleNamespace

import pytest
import torch

from src.callbacks.checkpoint import RunCheckpoint
from src.core.nonfinite import FiniteGuard, NonFiniteError
from src.core.weights import read
from src.training.stage1_step import TrainingStep
from tests.training import same, train

QUIET = ["~callbacks.rfid", "logger=csv", "callbacks.checkpoint.every_n_steps=1"]


def poison(monkeypatch, term, at, attribute="reconstruction_gradient"):
    """Make one loss term and its gradient NaN at the `at`-th call (from 0)."""
    original, calls = getattr(TrainingStep, attribute), iter(range(1000))

    def poisoned(self, *arguments):
        values, gradient = original(self, *arguments)
        if next(calls) in at:
            gradient = gradient * math.nan
            if isinstance(values, dict):
                values |= {term: values[term] * math.nan, "loss": values["loss"] * math.nan}
            else:
                values = values * math.nan
        return values, gradient

    monkeypatch.setattr(TrainingStep, attribute, poisoned)


def last(folder):
    return read(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    ("term", "attribute"),
    [("lpips", "reconstruction_gradient"), ("l1", "reconstruction_gradient"), ("gan", "gan_gradient")],
)
def test_training_stops_and_names_the_term_and_the_step(monkeypatch, tmp_path, term, attribute):
    poison(monkeypatch, term, at=[2], attribute=attribute)
    bad_step = 2 if attribute == "reconstruction_gradient" else 3  # the GAN term starts at step 1
    with pytest.raises(NonFiniteError, match=rf"{term} is NaN or infinite at step {bad_step}.*max_skipped_steps=0"):
        train(tmp_path, *QUIET)
    content = last(tmp_path)
    assert content["global_step"] == bad_step
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


def test_as_many_steps_as_allowed_are_skipped_and_counted(monkeypatch, tmp_path):
    poison(monkeypatch, "l1", at=[1, 3])
    run = train(tmp_path, *QUIET, "trainer.max_skipped_steps=2")
    assert run.trainer.global_step == 6 and run.module.guard.skipped == 2
    assert last(tmp_path)["skipped_steps"] == 2
    assert "train/skipped_steps" in (tmp_path / "metrics.csv").read_text()
    poison(monkeypatch, "l1", at=[0, 1, 2])
    with pytest.raises(NonFiniteError, match="3 such"):
        train(tmp_path / "more", *QUIET, "trainer.max_skipped_steps=2")


def test_a_skipped_step_touches_neither_weights_nor_moments(monkeypatch, tmp_path):
    train(tmp_path / "before", *QUIET, "trainer.max_steps=1", "model.disc_weight=0")
    poison(monkeypatch, "l1", at=[1])
    train(tmp_path / "after", *QUIET, "trainer.max_steps=2", "trainer.max_skipped_steps=1", "model.disc_weight=0")
    a, b = last(tmp_path / "before"), last(tmp_path / "after")
    decoder = [name for name in a["state_dict"] if name.startswith("rae.decoder")]
    assert decoder and all(torch.equal(a["state_dict"][n], b["state_dict"][n]) for n in decoder)
    assert same(a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"])


def test_gradient_overflow_with_finite_losses_is_named(monkeypatch, tmp_path):
    original = TrainingStep.reconstruction_gradient
    monkeypatch.setattr(
        TrainingStep, "reconstruction_gradient", lambda self, *a: (lambda t, g: (t, g * math.inf))(*original(self, *a))
    )
    with pytest.raises(NonFiniteError, match="gradient is NaN or infinite at step 0"):
        train(tmp_path, *QUIET, "model.disc_weight=0")


def test_the_guard_remembers_the_first_step_and_reports_no_good_ones():
    guard = FiniteGuard(max_skipped_steps=1)
    good, bad = torch.tensor(1.0), torch.tensor(math.inf)
    assert guard.observe(0, {"l1": good, "gan": good}) == 0
    assert guard.observe(1, {"l1": good, "gan": bad}) == 1
    guard.check()
    assert guard.observe(2, {"l1": bad, "gan": bad}) == 1
    with pytest.raises(NonFiniteError, match="gan is NaN or infinite at step 1"):
        guard.check()


def test_both_networks_going_wrong_is_one_step():
    guard, bad = FiniteGuard(max_skipped_steps=2), torch.tensor(math.nan)
    for step in (4, 5):
        guard.observe(step, {"l1": bad})
        guard.observe(step, {"discriminator loss": bad})
    assert guard.skipped == 2
    guard.check()


def test_a_score_that_is_not_a_number_is_never_the_best():
    checkpoint = RunCheckpoint(every_n_steps=0, every_n_minutes=0, every_n_epochs=0, keep_epochs=0)
    checkpoint.monitor = "val/loss"
    found = []
    for step, score in enumerate((math.nan, 3.0, math.nan, math.inf, 2.0, 2.5), 1):
        found.append(checkpoint._is_better(SimpleNamespace(scores={"val/loss": (step, score)})))
    assert found == [False, True, False, False, True, False]
    assert checkpoint.best == 2.0


def test_clipping_bounds_the_update(tmp_path):
    """With a bound far below the gradient's norm, Adam's second moments are those of clipped gradients."""
    train(tmp_path / "free", *QUIET, "trainer.max_steps=1", "model.disc_weight=0")
    train(tmp_path / "clipped", *QUIET, "trainer.max_steps=1", "model.disc_weight=0", "trainer.gradient_clip_val=1e-3")
    moments = [
        sum(s["exp_avg_sq"].sum() for s in last(tmp_path / n)["optimizer_states"][0]["state"].values())
        for n in ("free", "clipped")
    ]
    assert moments[1] == pytest.approx(0.05 * 1e-6, rel=1e-2)  # (1 - beta2) * norm^2
    assert moments[0] > 100 * moments[1]
