"""Callbacks for progress, throughput, checkpoints and warnings, checked through logs, metrics and files."""

import logging
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from src.callbacks import progress
from src.callbacks.samples import SampleImages
from src.core.distributed import RankRequests
from src.data.loader import TrainLoader
from src.training.stage1 import RAEModule
from tests.training import QUIET, logged, train


def test_timed_save_on_several_ranks_happens_once(tmp_path, monkeypatch):
    """Requests of two ranks are answered a step later; a repeat in between is the same request."""
    pending, saved = [[False, False]], []

    def answer_a_step_later(self, requests, world_size):
        pending.append(requests)
        return pending.pop(0)

    save = pl.Trainer.save_checkpoint
    monkeypatch.setattr(RankRequests, "exchange", answer_a_step_later)
    monkeypatch.setattr(
        pl.Trainer, "save_checkpoint", lambda self, *a, **k: (saved.append(self.global_step), save(self, *a, **k))
    )
    often = ["callbacks.checkpoint.every_n_steps=0", "callbacks.checkpoint.every_n_minutes=1e-9"]
    train(tmp_path, *QUIET, *often, "trainer.limit_train_batches=7", "trainer.max_epochs=1", "model.disc_weight=0")
    assert saved == [2, 4, 6, 7]  # the last one at the end of the epoch


def advance(monkeypatch, clock, owner, name, seconds):
    original = getattr(owner, name)

    def slow(*args, **kwargs):
        clock.now += seconds
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def clock(monkeypatch):
    """Fake the clock of the throughput: a step takes 1 s, everything that is not training far longer."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    advance(monkeypatch, clock, RAEModule, "training_step", 1.0)
    advance(monkeypatch, clock, RAEModule, "validation_step", 100.0)
    advance(monkeypatch, clock, SampleImages, "draw", 1000.0)
    advance(monkeypatch, clock, pl.Trainer, "save_checkpoint", 10000.0)
    return clock


def test_throughput_includes_data_wait_but_not_evaluation_samples_and_checkpoints(tmp_path, monkeypatch, clock):
    original = TrainLoader.__iter__

    def slow(self):
        for batch in original(self):
            clock.now += 0.25
            yield batch

    monkeypatch.setattr(TrainLoader, "__iter__", slow)
    train(tmp_path, *QUIET, "model.sample_every=1", "callbacks.checkpoint.every_n_steps=1")
    assert logged(tmp_path, "perf/images_per_s") == pytest.approx(dict.fromkeys(range(1, 7), 4 / 1.25))
    assert logged(tmp_path, "perf/data_wait") == pytest.approx(dict.fromkeys(range(1, 7), 0.2))


@pytest.mark.parametrize(
    ("loader", "every", "expected", "warned"),
    [(0.24, 22, 1 / 6, False), (0.30, 22, 1 / 3, True), (0.30, 10, 1 / 3, False), (0.15, 22, 0.0, False)],
)
def test_data_wait_on_a_gpu_is_the_idle_time_of_the_gpu(monkeypatch, caplog, loader, every, expected, warned):
    """A step takes 200 ms on the GPU and 20 ms on the host, which then waits for the loader while the GPU computes."""
    now = SimpleNamespace(host=0.0, gpu=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(now.host, now.gpu)

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    def synchronize():
        now.host = max(now.host, now.gpu)

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now.host))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(progress, "peak_memory_gb", lambda device: 1.0)
    module = SimpleNamespace(
        device=torch.device("cuda"), settings=SimpleNamespace(log_every_n_steps=every),
        ends_update=lambda number: True, check_numbers=synchronize, train_terms={"train/loss": torch.ones(())}, sparse_terms=(), steps_per_epoch=100,
        learning_rates=lambda step: {}, nonfinite=SimpleNamespace(max_skipped_steps=0), write_metrics=lambda values: None,
    )  # fmt: skip
    trainer = SimpleNamespace(
        is_global_zero=False, world_size=1, global_step=0, max_epochs=1, max_steps=-1, callbacks=[]
    )
    callback = progress.TrainingProgress()
    callback.on_train_start(trainer, module)
    for number in range(2 * every):
        now.host = max(now.host, number * loader)  # when the batch is ready
        callback.on_train_batch_start(trainer, module, None, number)
        now.gpu = max(now.host, now.gpu) + 0.2
        now.host += 0.02
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, {"position": [0]}, number)
    assert callback.speed["data_wait"] == pytest.approx(expected, abs=0.01)
    left = 100 - 2 * every  # updates
    assert callback.speed["seconds_left"] == pytest.approx(left * max(loader, 0.2), rel=0.1)
    assert ("Data loading is the bottleneck" in caplog.text) == warned


def test_only_the_images_of_a_batch_stay_tensors(stage1_run):
    """DDP moves tensors to the GPU, and reading one back would wait for the whole step."""
    _, run = stage1_run
    batch = next(iter(run.datamodule.train_dataloader()))
    moved = RAEModule.transfer_batch_to_device(run.module, batch, torch.device("cpu"), 0)
    assert [name for name, value in moved.items() if isinstance(value, torch.Tensor)] == ["image"]
    assert moved["position"].tolist() == batch["position"].tolist()


@pytest.mark.parametrize(
    ("starts", "pretrained", "said"),
    [
        ((0, 6), True, ["GAN term starts at epoch 0, the discriminator's updates only at epoch 6", "No GPU is used", "UNTRAINED by request: LPIPS"]),
        ((6, 6), True, ["GAN term starts at epoch 6, but trainer.max_epochs=2", "No GPU is used"]),
        ((0, 0), False, ["UNTRAINED by request: encoder, LPIPS, discriminator trunk"]),
    ],
)  # fmt: skip
def test_warnings_at_the_start(stage1_run, caplog, monkeypatch, starts, pretrained, said):
    (gan, disc), (_, run) = starts, stage1_run
    epochs = {"disc_start_epoch": gan, "disc_upd_start_epoch": disc}
    monkeypatch.setattr(run.module, "settings", run.module.settings.model_copy(update=epochs))
    monkeypatch.setattr(run.module.rae.encoder, "untrained", not pretrained)
    with caplog.at_level(logging.WARNING):
        progress.warn(run.trainer, run.module)
    messages = [record.getMessage() for record in caplog.records]
    for words in said:
        assert any(words in message for message in messages), messages
    assert any("GAN term" in message for message in messages) == (disc > 0)
    assert any("No GPU" in message for message in messages) == pretrained
