"""A resumed run equals one that was never interrupted: the same weights, moments, averages and batches, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch

from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT, read
from src.training.stage1 import RAEModule
from src.training.step_noise import StepNoise
from tests.training import QUIET, assert_equal_ends, last, train, train_stage2

EVERY_STEP = ["callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_epochs=-1"]


@pytest.fixture
def whole(stage1_run):
    return stage1_run[0]


@pytest.mark.parametrize(("stop", "changes"), [(1, []), (3, []), (4, []), (2, ["data.num_workers=2"])])
def test_resume_after_any_step_gives_the_same_run(whole, tmp_path, caplog, stop, changes):
    """Also with other workers; no change of settings is logged."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, *QUIET, *EVERY_STEP, *changes, f"trainer.max_steps={stop}")
    assert torch.load(last(first), weights_only=True)["global_step"] == stop
    assert len(list(first.glob("checkpoints/epoch_*.ckpt"))) == stop // 3  # of whole epochs
    caplog.clear()
    train(second, *QUIET, *EVERY_STEP, checkpoint=last(first))
    assert_equal_ends(whole, second)
    assert not [r.getMessage() for r in caplog.records if " is now " in r.getMessage()]


@pytest.mark.parametrize("key", ["pretrained_decoder_path", "pretrained_path"])
def test_resume_does_not_need_the_file_that_the_run_started_from(whole, stage2_run, autoencoder, tmp_path, caplog, key):
    source, begin = (whole, train) if key == "pretrained_decoder_path" else (stage2_run[0], train_stage2)
    common = [*QUIET, *EVERY_STEP] if begin is train else [autoencoder]
    started = Path(shutil.copy(last(source), tmp_path / "started_from.ckpt"))
    begin(tmp_path / "first", *common, f"model.{key}={started}", "trainer.max_steps=2")
    started.unlink()
    run = begin(tmp_path / "second", *common, f"model.{key}={started}", checkpoint=last(tmp_path / "first"))
    assert run.trainer.global_step == 6 and " is now " not in caplog.text
    assert run.module.run_config["model"][key] == str(started)  # where it came from stays on record


@pytest.mark.parametrize("saves", ["default", "no_checkpoint"])
def test_resume_with_another_number_of_micro_batches_takes_the_same_images(whole, tmp_path, monkeypatch, saves):
    """The global batch is the same, so the same images follow, each once."""
    halves = ["data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=6"]
    seen, places = [], []
    original, augment = RAEModule.training_step, StepNoise.augment

    def training_step(self, batch, batch_idx):
        seen.extend(batch["position"].tolist())
        return original(self, batch, batch_idx)

    def noted(self, purpose, batch, number, *more):
        places.append((int(batch["position"][0]), number))
        return augment(self, purpose, batch, number, *more)

    monkeypatch.setattr(StepNoise, "augment", noted)
    train(tmp_path / "first", *QUIET, *EVERY_STEP, *halves, "trainer.max_steps=2")
    assert sorted(set(places)) == [(4, 2), (6, 3)]  # of the second update, the first with the GAN
    monkeypatch.setattr(RAEModule, "training_step", training_step)
    saving = ["callbacks=no_checkpoint"] if saves == "no_checkpoint" else EVERY_STEP
    run = train(tmp_path / "second", *QUIET, *saving, checkpoint=last(tmp_path / "first"))
    assert run.trainer.global_step == 6
    assert seen == [*range(8, 12), *range(12)]  # the third update of the first epoch, and the second epoch


@pytest.mark.parametrize("hook", ["transfer_batch_to_device", "training_step"])
def test_exception_between_two_updates_saves_and_one_in_an_update_does_not(whole, tmp_path, monkeypatch, hook):
    original = getattr(RAEModule, hook)

    def fails(self, *given):
        if self.global_step == 2:
            raise RuntimeError("bad luck")
        return original(self, *given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="bad luck"):
        patch.setattr(RAEModule, hook, fails)
        train(tmp_path / "first", *QUIET)
    assert last(tmp_path / "first").exists() == (hook != "training_step")
    if hook != "training_step":
        train(tmp_path / "second", *QUIET, checkpoint=last(tmp_path / "first"))
        assert_equal_ends(whole, tmp_path / "second")


def test_best_starts_over_if_only_the_last_checkpoint_was_copied(whole, tmp_path, caplog):
    content = read(last(whole))
    next(state for name, state in content["callbacks"].items() if "RunCheckpoint" in name)["best"] = 0.0  # unreachable
    torch.save(content, tmp_path / "last.ckpt")
    train(tmp_path / "second", *QUIET, "trainer.max_epochs=3", checkpoint=tmp_path / "last.ckpt")
    assert read(tmp_path / "second/checkpoints/best.ckpt")["global_step"] == 9
    assert "best.ckpt does not exist" in caplog.text and "never a finite number" not in caplog.text


@pytest.mark.parametrize(("name", "state", "changes"), [
    ("Timer", {"time_elapsed": dict.fromkeys(("train", "sanity_check", "validate"), 7200.0)}, ["+trainer.max_time.hours=1"]),
    ("EarlyStopping{'monitor': 'val/loss', 'mode': 'min'}", {"wait_count": 3, "stopped_epoch": 0, "best_score": torch.zeros(()), "patience": 3},
     ["callbacks=[default,early_stopping]", "callbacks.early_stopping.patience=5"]),
])  # fmt: skip
def test_time_limit_and_patience_are_those_of_the_resume(whole, tmp_path, name, state, changes):
    content = read(last(whole))
    content["callbacks"][name] = state  # as in a run that it ended
    torch.save(content, tmp_path / "last.ckpt")
    run = train(tmp_path, *changes, *QUIET, "trainer.max_epochs=4", checkpoint=tmp_path / "last.ckpt")
    assert run.trainer.global_step == 12


def test_checkpoint_beyond_the_end_of_a_shorter_epoch_is_rejected(tmp_path):
    train(tmp_path / "first", *QUIET, *EVERY_STEP, "trainer.max_steps=2")
    with pytest.raises(UserError, match=r"saved after micro-batch 2.*now has 1"):
        train(tmp_path / "second", *QUIET, "trainer.limit_train_batches=1", checkpoint=last(tmp_path / "first"))


def test_finished_run_resumes_to_its_end_or_to_more_epochs_with_its_encoder_moved(whole, tmp_path, caplog):
    caplog.set_level("INFO")
    run = train(tmp_path / "again", *QUIET, checkpoint=last(whole))
    assert run.trainer.global_step == 6 and caplog.text.endswith("Done after 6 steps.\n")
    moved = shutil.copytree(PROJECT_ROOT / "configs/encoder/dinov2_tiny", tmp_path / "moved")
    more = [f"model.encoder_config_path={moved}", "trainer.max_epochs=3"]
    assert train(tmp_path / "longer", *QUIET, *more, checkpoint=last(whole)).trainer.global_step == 9


def test_checkpoint_holds_only_plain_values_and_no_frozen_weights(whole):
    content = torch.load(last(whole), weights_only=True)
    names = content["state_dict"].keys()
    assert not [n for n in names if n.startswith(("rae.encoder", "lpips", "discriminator.trunk"))]
    assert any(n.startswith("rae.decoder.") for n in names) and any(n.startswith("ema_decoder.") for n in names)
    assert content["format_version"] == 1 and content["config"]["model"]["encoder_cls"] == "Dinov2withNorm"


def test_resume_logs_changed_settings(whole, tmp_path, caplog):
    changes = ["model.optimizer.lr=5e-4", "data.batch_size=2", "data.num_workers=1", "trainer.precision=bf16"]
    changes.append("data.storage_options={key: hidden}")
    caplog.set_level("INFO")
    train(tmp_path / "changed", *QUIET, *changes, "trainer.max_epochs=3", checkpoint=last(whole))
    said = "\n".join(record.getMessage() for record in caplog.records)
    changed = {"decay_end_epoch": (2, 3), "optimizer.lr": (0.001, 0.0005), "batch": (4, 2), "precision": (32, "bf16")}
    for key, (before, now) in changed.items():
        assert f"{key} was {before} and is now {now}" in said
    assert "Resuming at step 6 (epoch 2)" in said  # counted from 1, as in the progress lines
    assert not any(words in said for words in ("num_workers was", "data.batch_size was", "storage_options"))
