"""NaN and infinity: which term, at which step, how often, and what is left of the weights."""

import math
from types import SimpleNamespace

import pytest
import torch

from src.callbacks.checkpoint import RunCheckpoint
from src.core.nonfinite import NonFiniteCounter, NonFiniteError
from src.core.weights import read
from src.losses.gan import GENERATOR_LOSSES
from src.training.stage1_step import TrainingStep
from tests.training import same, train

QUIET = ["~callbacks.rfid", "logger=csv", "callbacks.checkpoint.every_n_steps=1"]


def poison(monkeypatch, name, at, only_gradient=False):
    """Multiply a term of the loss by NaN at the `at`-th training steps that have it (from 0), or its gradient by infinity."""
    calls = iter(range(1000))

    def spoil(value):
        if torch.is_grad_enabled() and next(calls) in at:
            if only_gradient:
                value.register_hook(lambda gradient: gradient * math.inf)
                return value
            return value * math.nan
        return value

    if name == "gan":
        term = GENERATOR_LOSSES["hinge"]
        monkeypatch.setitem(GENERATOR_LOSSES, "hinge", lambda logits: spoil(term(logits)))
        return
    original = TrainingStep.reconstruction_terms

    def poisoned(self, phase):
        weight, term = (terms := original(self, phase))[name]
        return terms | {name: (weight, lambda output, target: spoil(term(output, target)))}

    monkeypatch.setattr(TrainingStep, "reconstruction_terms", poisoned)


def last(folder):
    return read(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("name", "bad_step"), [("lpips", 2), ("l1", 2), ("gan", 3)])  # the GAN term starts at step 1
def test_training_stops_and_names_the_term_and_the_step(monkeypatch, tmp_path, name, bad_step, accumulate):
    poison(monkeypatch, name, at=[2 * accumulate])  # with two micro-batches, in the first of them
    updates = [f"trainer.accumulate_grad_batches={accumulate}", f"trainer.limit_train_batches={3 * accumulate}"]
    with pytest.raises(NonFiniteError, match=rf"^{name} is NaN or infinite at step {bad_step}.*max_skipped_steps=0"):
        train(tmp_path, *QUIET, *updates)
    content = last(tmp_path)
    assert content["global_step"] == bad_step
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


def test_as_many_steps_as_allowed_are_skipped_and_counted(monkeypatch, tmp_path):
    poison(monkeypatch, "l1", at=[1, 3])
    run = train(tmp_path, *QUIET, "trainer.max_skipped_steps=2")
    assert run.trainer.global_step == 6 and run.module.nonfinite.skipped == 2
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
    poison(monkeypatch, "l1", at=[0], only_gradient=True)
    with pytest.raises(NonFiniteError, match="^gradient is NaN or infinite at step 0"):
        train(tmp_path, *QUIET, "model.disc_weight=0")


def test_the_first_step_of_a_name_and_the_cause_among_several():
    counter = NonFiniteCounter(max_skipped_steps=1)
    good, bad = torch.tensor(1.0), torch.tensor(math.inf)
    assert counter.observe(0, {"l1": good, "gan": good}) == 0
    assert counter.observe(1, {"loss": bad, "gan": bad, "l1": good}) == 1
    counter.check()
    assert counter.observe(2, {"l1": bad, "a term of one's own": bad}) == 1
    with pytest.raises(NonFiniteError, match=r"^gan is .* at step 1 \(then: loss, a term of one's own, l1\)"):
        counter.check()


def test_both_networks_going_wrong_is_one_step():
    counter, bad = NonFiniteCounter(max_skipped_steps=2), torch.tensor(math.nan)
    for step in (4, 5):
        counter.observe(step, {"l1": bad})
        counter.observe(step, {"discriminator loss": bad})
    assert counter.skipped == 2
    counter.check()


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
    moments = {}
    for name, option in {"free": "null", "clipped": "1e-3"}.items():
        train(
            tmp_path / name, *QUIET, "trainer.max_steps=1", "model.disc_weight=0", f"trainer.gradient_clip_val={option}"
        )
        states = last(tmp_path / name)["optimizer_states"][0]["state"]
        moments[name] = sum(state["exp_avg_sq"].sum() for state in states.values())
    assert moments["clipped"] == pytest.approx(0.05 * 1e-6, rel=1e-2)  # (1 - beta2) * norm^2
    assert moments["free"] > 100 * moments["clipped"]
