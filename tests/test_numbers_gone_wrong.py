"""NaN and infinity: errors name term and step, bad steps are skipped and counted, and weights stay finite."""

import math
import re
import zipfile

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.callbacks.checkpoint import AtomicCheckpointIO
from src.core.errors import UserError
from src.core.nonfinite import NonFiniteCounter, NonFiniteError, _tensors, nonfinite_tensors
from src.core.weights import load_strict, read
from src.losses.gan import GENERATOR_LOSSES
from src.training.stage1 import RAEModule
from src.training.stage1_step import TrainingStep
from tests.training import QUIET as BASE
from tests.training import last, logged, same, train

QUIET = [*BASE, "callbacks.checkpoint.every_n_steps=1"]


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


@pytest.mark.parametrize(
    ("name", "bad_step", "accumulate"), [("lpips", 2, 1), ("l1", 2, 2), ("gan", 3, 1)]
)  # the GAN term starts at step 1
def test_training_stops_and_names_the_term_and_the_step(monkeypatch, tmp_path, name, bad_step, accumulate):
    poison(monkeypatch, name, at=[2 * accumulate])  # with two micro-batches, in the first of them
    updates = [f"trainer.accumulate_grad_batches={accumulate}", f"trainer.limit_train_batches={3 * accumulate}"]
    with pytest.raises(NonFiniteError, match=rf"^{name} is NaN or infinite at step {bad_step}.*max_skipped_steps=0"):
        train(tmp_path, *QUIET, *updates)
    content = read(last(tmp_path))
    assert content["global_step"] == bad_step
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


def test_as_many_steps_as_allowed_are_skipped_and_counted(monkeypatch, tmp_path):
    poison(monkeypatch, "l1", at=[1, 3])
    run = train(tmp_path, *QUIET, "trainer.max_skipped_steps=2")
    assert run.trainer.global_step == 6 and run.module.nonfinite.skipped == 2
    assert read(last(tmp_path))["skipped_steps"] == logged(tmp_path, "train/skipped_steps")[6] == 2
    longer = ["trainer.max_skipped_steps=2", "trainer.max_epochs=3"]
    again = train(tmp_path / "again", *QUIET, *longer, checkpoint=last(tmp_path))
    assert again.module.nonfinite.skipped == 2  # counted across the resume
    poison(monkeypatch, "l1", at=[0, 1, 2])
    with pytest.raises(NonFiniteError, match="3 such"):
        train(tmp_path / "more", *QUIET, "trainer.max_skipped_steps=2")


def test_skipped_step_touches_neither_weights_nor_moments(monkeypatch, tmp_path):
    train(tmp_path / "before", *QUIET, "trainer.max_steps=1", "model.disc_weight=0")
    poison(monkeypatch, "l1", at=[1])
    train(tmp_path / "after", *QUIET, "trainer.max_steps=2", "trainer.max_skipped_steps=1", "model.disc_weight=0")
    a, b = (read(last(tmp_path / name)) for name in ("before", "after"))
    decoder = [name for name in a["state_dict"] if name.startswith("rae.decoder")]
    assert decoder and all(torch.equal(a["state_dict"][n], b["state_dict"][n]) for n in decoder)
    assert same(a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"])


def test_gradient_overflow_with_finite_losses_is_named(monkeypatch, tmp_path):
    poison(monkeypatch, "l1", at=[0], only_gradient=True)
    with pytest.raises(NonFiniteError, match="^gradient is NaN or infinite at step 0"):
        train(tmp_path, *QUIET, "model.disc_weight=0")


GOOD, BAD = torch.tensor(1.0), torch.tensor(math.nan)


@pytest.mark.parametrize(
    ("allowed", "observed", "said"),
    [
        (1, [(0, {"l1": BAD}), (3, {"l1": BAD})], "at step 0; 2 such.*first step, so look at what was loaded.*ckpt_path"),
        # the first bad step of a term, and the cause among several
        (1, [(0, {"l1": GOOD, "gan": GOOD}), (1, {"loss": BAD, "gan": BAD, "l1": GOOD}), (2, {"l1": BAD, "my own": BAD})],
         r"^gan is .* at step 1 \(then: loss, my own, l1\)"),
        # the terms of a step change when a loss starts
        (1, [(0, {"l1": GOOD}), (1, {"l1": BAD, "gan": GOOD}), (2, {"l1": BAD})], "^l1 is NaN or infinite at step 1; 2 such"),
        # both networks going wrong is one step
        (2, [(step, {name: BAD}) for step in (4, 5) for name in ("l1", "discriminator loss")], None),
    ],
)  # fmt: skip
def test_counted_steps_and_named_terms(allowed, observed, said):
    counter = NonFiniteCounter(allowed)
    flaws = [int(counter.observe(step, terms)) for step, terms in observed]
    assert flaws == [any(term is BAD for term in terms.values()) for _, terms in observed]
    assert counter.skipped == len({step for (step, _), flaw in zip(observed, flaws, strict=True) if flaw})
    if said is None:
        counter.check()
        counter = NonFiniteCounter(allowed)
        counter.skipped = 3  # from before a resume, with unknown causes
        counter.check()
        return
    with pytest.raises(NonFiniteError, match=said):
        counter.check()


def test_checking_more_terms_takes_no_more_operations():
    """Each operation is a GPU kernel of some microseconds, twice a step."""

    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += not func.is_view
            return func(*args, **(kwargs or {}))

    def count(names):
        counter, values = NonFiniteCounter(0), {name: torch.tensor(1.0) for name in names}
        counter.observe(0, values)
        with Operations() as operations:
            counter.observe(1, values)
        return operations.count

    assert count("abcdefgh") == count("a") <= 15


def test_clipping_bounds_the_update(tmp_path):
    """With a bound far below the gradient's norm, Adam's second moments are those of clipped gradients."""
    moments = {}
    for name, option in {"free": "null", "clipped": "1e-3"}.items():
        one_step = ["trainer.max_steps=1", "model.disc_weight=0", f"trainer.gradient_clip_val={option}"]
        train(tmp_path / name, *QUIET, *one_step)
        states = read(last(tmp_path / name))["optimizer_states"][0]["state"]
        moments[name] = sum(state["exp_avg_sq"].sum() for state in states.values())
    assert moments["clipped"] == pytest.approx(0.05 * 1e-6, rel=1e-2)  # (1 - beta2) * norm^2
    assert moments["free"] > 100 * moments["clipped"]


# -- checkpoints and weight files


@pytest.mark.parametrize("file_type", [".ckpt", ".pt", ".pth"])
def test_flipped_bits_are_noticed(tmp_path, file_type):
    """In each entry of an archive, tensors included; the intact file is read."""
    torch.manual_seed(0)
    whole = tmp_path / f"whole{file_type}"
    torch.save({"a": torch.randn(500), "b": torch.arange(7), "c": {"d": 1.5}}, whole)
    assert read(whole)["c"] == {"d": 1.5}
    content = whole.read_bytes()
    with zipfile.ZipFile(whole) as archive:
        entries = [(entry.header_offset, archive.read(entry)) for entry in archive.infolist()]
    places = [content.index(data, start + 30) + len(data) // 2 for start, data in entries if data]
    assert len(places) >= 4
    for place in places:
        damaged = tmp_path / f"damaged{file_type}"
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"damaged.*(CRC-32|cut short)|can't be read|was refused"):
            read(damaged)


def test_archives_without_crcs_are_read(tmp_path):
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    try:
        set_crc32_options(False)
        torch.save({"a": torch.ones(100)}, tmp_path / "file.pt")
    finally:
        set_crc32_options(before)
    assert read(tmp_path / "file.pt")["a"].sum() == 100


@pytest.mark.parametrize(
    ("part", "value"),
    [("state_dict.ema_decoder", math.nan), ("state_dict.rae.decoder", math.inf), ("optimizer_states.0", -math.inf)],
)
def test_checkpoint_with_a_non_finite_number_is_rejected(tmp_path, stage1_run, part, value):
    content = read(last(stage1_run[0]))
    found = dict(_tensors(content, ""))
    name = next(name for name, tensor in found.items() if name.startswith(part) and tensor.is_floating_point())
    found[name].view(-1)[-1] = value
    file = tmp_path / "bad.ckpt"
    torch.save(content, file)
    said = rf"bad\.ckpt holds numbers that are NaN or infinite, in [12] tensor.*{re.escape(name)}"
    with pytest.raises(UserError, match=said):
        AtomicCheckpointIO().load_checkpoint(file)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weight_file_with_a_non_finite_number_is_rejected(value):
    layer = torch.nn.Linear(2, 2)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["bias"][1] = value
    with pytest.raises(UserError, match=r"some\.pt holds numbers .* in 1 tensor\(s\): bias"):
        load_strict(layer, state, "some.pt")


@pytest.mark.parametrize("large", [torch.full((4,), 3e38), torch.full((4,), 6e4, dtype=torch.float16)])
def test_finite_tensors_whose_sum_overflows_are_accepted(large):
    assert nonfinite_tensors({"a": [large, torch.arange(3)]}) == []
    assert nonfinite_tensors({"a": [large * 2, torch.ones(2)], "b": large * 9}) == ["a.0", "b"]


@pytest.mark.parametrize(("at", "blamed"), [(0, "what was loaded"), (2, "a lower model.optimizer.lr")])
def test_non_finite_weights_are_never_saved(tmp_path, monkeypatch, at, blamed):
    """Whatever caused them: here the update itself, with finite loss and gradient."""
    original_step = RAEModule.training_step

    def training_step(self, batch, batch_idx):
        original_step(self, batch, batch_idx)
        if self.global_step == at + 1:
            with torch.no_grad():
                next(self.rae.decoder.parameters()).view(-1)[0] = math.nan

    monkeypatch.setattr(RAEModule, "training_step", training_step)
    said = rf"Nothing was saved at step {at + 1}: [12] tensor.*{blamed}"
    with pytest.raises(NonFiniteError, match=said) as caught:
        train(tmp_path, *QUIET)
    kept = last(tmp_path)
    assert kept.exists() == (at > 0) and (at == 0 or read(kept)["global_step"] == at)
    assert ("is unchanged" in str(caught.value)) == (at > 0)


def test_validation_loss_of_nan_is_logged_as_an_error_and_never_the_best(tmp_path, monkeypatch, caplog):
    original = RAEModule.record_scores
    spoilt = {"val/loss": math.nan}
    monkeypatch.setattr(RAEModule, "record_scores", lambda self, values: original(self, {**values, **spoilt}))
    train(tmp_path, *QUIET, "trainer.max_epochs=1", "model.disc_weight=0")
    errors = "\n".join(record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert "val/loss is nan at step 3" in errors and "no best.ckpt" in errors
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == ["epoch_001.ckpt", "last.ckpt"]
