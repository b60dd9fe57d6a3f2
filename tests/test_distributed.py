"""Data parallelism, with two gloo processes on the CPU in place of two GPUs."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.strategies import DDPStrategy

from src.core.distributed import Launch
from src.data import dummy
from src.training.trainer import build_trainer
from tests.tiny_models import two_processes
from tests.training import QUIET, SMALL, composed, python

STEPS = 10
# One global batch of 4 either way; GAN phase from the first step.
COMMON = [
    "trainer.max_epochs=1", f"trainer.limit_train_batches={STEPS}", "model.disc_upd_start_epoch=0", "model.disc_start_epoch=0",
    "model.scheduler.type=constant", "model.scheduler.warmup_epochs=0", "model.optimizer.lr=1e-3",
    "model.disc_scheduler.type=constant", "model.disc_scheduler.warmup_epochs=0", "model.disc_optimizer.lr=1e-3",
    "trainer.limit_val_batches=1.0",
]  # fmt: skip


def launch(out: Path, processes: int, *overrides: str) -> list[dict]:
    out.mkdir()
    start = two_processes if processes == 2 else python
    start("tests/rank_probe.py", out, *COMMON, f"paths.log_dir={out}", *overrides)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    base = tmp_path_factory.mktemp("ranks")
    return launch(base / "two", 2, "data.batch_size=2"), launch(base / "one", 1, "data.batch_size=4")[0]


def test_ranks_are_bit_equal_after_every_step(results):
    (first, second), _ = results
    assert len(first["digests"]) == STEPS
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == STEPS  # and the weights do move


def test_ranks_share_the_images_and_none_comes_twice(results):
    (first, second), one = results
    for a, b, together in zip(first["positions"], second["positions"], one["positions"], strict=True):
        assert a + b == together
    everything = sum(first["positions"] + second["positions"], [])
    assert len(set(everything)) == len(everything) == 4 * STEPS


def test_gradients_and_adaptive_weight_equal_those_of_one_process(results):
    """To 1 % of the largest: where L1 or a ReLU is near 0, rounding flips gradients, depending on the CPU."""
    (first, _), one = results
    assert one["weights"][0] > 0
    assert first["weights"][0] == pytest.approx(one["weights"][0], rel=1e-3)
    for update in (0, 1):  # the decoder's, then the discriminator's, in the first step
        mine, theirs = (torch.cat([g.flatten() for g in run["gradients"][update]]) for run in (first, one))
        assert (mine - theirs).abs().max() < 1e-2 * theirs.abs().max()


def test_weights_after_ten_steps_of_sgd_are_the_same(results):
    (first, _), one = results
    for name, value in one["state"].items():
        assert (first["state"][name] - value).abs().max() < 1e-5, name


def test_validation_is_the_same_number_on_one_and_two_processes(results):
    (first, second), one = results
    assert first["scores"] == second["scores"]
    for name, (step, value) in one["scores"].items():
        assert first["scores"][name][0] == step
        assert first["scores"][name][1] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
def test_per_rank_weights_as_published_and_fewer_held_out_images_than_ranks(tmp_path):
    """A rank without a validation image must still take part, or the other would wait forever."""
    held_out = ["data.hf_validation_split=null", "data.train_split=0.996", "trainer.limit_train_batches=1"]
    first, second = launch(tmp_path / "ranks", 2, "data.batch_size=2", "model.adaptive_weight=per_rank", *held_out)
    assert first["weights"][0] != pytest.approx(second["weights"][0], rel=1e-6)
    assert first["digests"] == second["digests"]  # the averaged gradient is still the same


@pytest.mark.slow
def test_ranks_with_different_data_are_an_error(tmp_path):
    """They would draw other images for the same positions, and one would wait for the other at the end of the epoch."""
    for rank in range(2):
        (tmp_path / f"set{rank}").mkdir()
        for i in range(24 - rank):
            (tmp_path / f"set{rank}/{i:02d}.jpg").write_bytes(dummy.jpeg(i))
    words = [*SMALL, *QUIET, "data.batch_size=2", f"paths.log_dir={tmp_path}"]
    said = two_processes("src/train.py", *words, f"data.data_dir={tmp_path}/set${{oc.env:RANK}}", code=1)
    assert said.count("Process 1 has other data than process 0: training: . changed (24, now 23)") == 2, said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/*"))


def test_several_devices_use_our_ddp_by_default(tmp_path):
    """Its gradients are views of the buckets; Lightning's default would keep a copy of them."""
    for devices, strategy, expected in ((2, "auto", True), (1, "auto", False), (1, "ddp", True)):
        words = [*SMALL, f"trainer.devices={devices}", f"trainer.strategy={strategy}"]
        config = OmegaConf.to_container(composed(words).trainer, resolve=True)
        trainer = build_trainer(config, Launch(0, 1, "single"), [], [], str(tmp_path))
        ours = isinstance(trainer.strategy, DDPStrategy) and trainer.strategy._ddp_kwargs.get("gradient_as_bucket_view")
        assert bool(ours) == expected, (devices, strategy)
