"""What watches a run and saves it, where no whole run is needed to see it."""

import logging
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from src.callbacks import checkpoint as checkpoint_module
from src.callbacks.checkpoint import RunCheckpoint
from src.callbacks.samples import SampleImages
from src.callbacks.startup import warn
from src.callbacks.throughput import Throughput, training_paused
from src.training.stage1 import RAEModule
from tests.training import composed, train

QUIET = ["~callbacks.rfid", "logger=csv"]


class OneCallLate:
    """An `Agreement` among two processes: each call is answered with the wishes of the call before."""

    def __init__(self) -> None:
        self.before = [False, False]

    def exchange(self, wishes, world_size):
        self.before, heard = wishes, self.before
        return heard


def test_a_timed_save_on_several_ranks_happens_once(monkeypatch):
    callback = RunCheckpoint(every_n_steps=0, every_n_minutes=1, every_n_epochs=0, keep_epochs=0)
    callback._agreement = OneCallLate()
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: clock.now)
    callback._saved_at, saved = 0.0, []
    trainer = SimpleNamespace(
        global_step=0, world_size=2, is_global_zero=True, callbacks=[], default_root_dir="nowhere",
        save_checkpoint=lambda path, weights_only: saved.append(trainer.global_step),
    )  # fmt: skip
    module = SimpleNamespace(
        settings=SimpleNamespace(loop=SimpleNamespace(accumulate_grad_batches=1)),
        steps_per_epoch=1000, scores={}, check_numbers=lambda: None,
    )  # fmt: skip
    for step in range(1, 13):
        trainer.global_step, clock.now = step, step * 12.0  # 60 s are over after five steps
        callback.on_train_batch_end(trainer, module, None, None, step - 1)
    assert saved == [7]  # wished at step 6, heard of at 7; the wish repeated at 7 is the same one


def test_saving_counts_neither_as_training_nor_as_waiting_for_data():
    throughput = Throughput()
    throughput._reset()
    trainer = SimpleNamespace(callbacks=[throughput])
    with training_paused(trainer):
        time.sleep(0.05)
    throughput.on_train_batch_start(trainer, None, None, 0)
    assert throughput._paused >= 0.05 and throughput._waited < 0.02


@pytest.mark.parametrize("part", ["pictures", "checkpoint"])
def test_pictures_and_checkpoints_are_no_training_time(tmp_path, monkeypatch, part):
    owner, name = {"pictures": (SampleImages, "draw"), "checkpoint": (pl.Trainer, "save_checkpoint")}[part]
    slow = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (time.sleep(0.3), slow(*a, **k))[1])
    paused = []
    publish = Throughput._publish
    monkeypatch.setattr(Throughput, "_publish", lambda self, *a: (paused.append(self._paused), publish(self, *a))[1])
    options = ["model.sample_every=1", "callbacks.checkpoint.every_n_steps=0"]
    if part == "checkpoint":
        options = ["callbacks.checkpoint.every_n_steps=1"]
    train(tmp_path, *QUIET, *options, "trainer.max_steps=2", "trainer.max_epochs=1")
    assert paused[1] >= 0.3  # what came after the first entry


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), *QUIET, "trainer.max_steps=1")


def test_the_discriminators_rate_is_never_negative(fitted):
    """Preflight updates it at steps that lie before its start."""
    warming_up = fitted.module.settings.disc_scheduler.model_copy(
        update={"warmup_epochs": 1.0, "warmup_from_zero": True}
    )
    settings = fitted.module.settings.model_copy(update={"disc_scheduler": warming_up})
    module = SimpleNamespace(settings=settings, steps_per_epoch=10)
    first = settings.starts.steps(10)["disc"]
    assert first > 1
    rates = [RAEModule._discriminator_lr(module, step, 0) for step in range(first + 3)]
    assert rates[0] > 0 and rates[: first + 1] == [rates[0]] * (first + 1)
    assert rates[first] < rates[first + 1] < rates[first + 2]


def test_all_but_the_images_leaves_the_tensors_behind(fitted):
    """DDP moves tensors to the GPU, and reading one back there would wait for the whole step."""
    batch = next(iter(fitted.datamodule.train_dataloader()))
    moved = RAEModule.transfer_batch_to_device(fitted.module, batch, torch.device("cpu"), 0)
    assert [name for name, value in moved.items() if isinstance(value, torch.Tensor)] == ["image"]
    assert moved["position"].tolist() == batch["position"].tolist()


def test_warnings_at_the_start(fitted, caplog, monkeypatch):
    starts = SimpleNamespace(disc_start_epoch=0, disc_upd_start_epoch=6)
    module = SimpleNamespace(
        settings=SimpleNamespace(starts=starts), discriminator=fitted.module.discriminator, lpips=None,
        rae=SimpleNamespace(encoder=SimpleNamespace(untrained=False)),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        warn(fitted.trainer, module)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "GAN term starts at epoch 0" in said and "No GPU is used" in said
    caplog.clear()
    starts.disc_upd_start_epoch, module.rae.encoder.untrained = 0, True
    with caplog.at_level(logging.WARNING):
        warn(fitted.trainer, module)
    assert "GAN term" not in caplog.text and "No GPU" not in caplog.text


@pytest.mark.parametrize("held_out", [1, 5])
def test_all_ranks_count_the_same_number_of_evaluation_batches(fitted, held_out):
    loaders = [fitted.datamodule.evaluation_loader(2, held_out, rank, 4) for rank in range(4)]
    assert len({len(loader) for loader in loaders}) == 1
    assert sum(len(batch["position"]) for loader in loaders for batch in loader) == held_out


def test_one_name_for_the_encoder():
    config = composed(["experiment=rae_dino", "model.encoder_config_path=facebook/dinov2-with-registers-large"])
    assert config.model.encoder_params.dinov2_path == "facebook/dinov2-with-registers-large"
