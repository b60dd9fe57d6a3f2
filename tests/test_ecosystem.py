"""Features of Lightning, Hydra and Weights & Biases that users rely on: callbacks, flags, sweeps, runs."""

import importlib.machinery
import importlib.util
import json
import os
import pickle
import sys
from types import ModuleType

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate

from src.callbacks import progress
from src.core import metrics_file
from src.core.errors import UserError
from src.formats.checkpoint import load_trained
from src.training.resume import find_checkpoint
from src.training.run import run as program
from src.training.stage1 import RAEModule
from tests.training import QUIET, SMALL, assert_equal_ends, composed, last, logged, python, same, train

LIGHT = [*QUIET, "model.disc_weight=0", "model.perceptual_weight=0"]


class Logs(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.log("mine/train", 1.0)

    def on_validation_epoch_end(self, trainer, module):
        module.log("mine/val", 0.5)


LOGS = "+callbacks.logs._target_=tests.test_ecosystem.Logs"


def theirs(folder):
    """Return overrides that add Lightning's own callbacks: two checkpoints, learning rates and a progress bar."""
    parts = {
        "best": "ModelCheckpoint", "by_step": "ModelCheckpoint", "rates": "LearningRateMonitor", "bar": "RichProgressBar"
    }  # fmt: skip
    options = [
        "best.monitor=val/loss", "best.save_top_k=-1",
        "by_step.every_n_train_steps=2", "by_step.save_top_k=-1", f"by_step.dirpath={folder}/by_step",
    ]  # fmt: skip
    words = [f"{name}._target_=pytorch_lightning.callbacks.{kind}" for name, kind in parts.items()] + options
    return [LOGS, *(f"+callbacks.{word}" for word in words)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Train two epochs of three updates of two micro-batches, with Lightning's callbacks beside ours."""
    folder = tmp_path_factory.mktemp("whole")
    halves = ["data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=6"]
    return folder, train(folder, *QUIET, *halves, *theirs(folder)), halves


def test_logged_values_reach_lightnings_callbacks(whole):
    folder, run, _ = whole
    rows = list(metrics_file.read(folder / "metrics.csv"))
    latest = {name: value for _, name, value, _ in rows}
    found = run.trainer.callback_metrics
    logged_by_others = {"lr-AdamW", "mine/train", "mine/val"}
    assert {
        "val/loss",
        "train/loss",
        "lr/generator",
        "perf/images_per_s",
        *logged_by_others,
    } <= found.keys() & latest.keys()
    assert all(float(found[name]) == pytest.approx(value, rel=1e-6) for name, value in latest.items())
    assert "train/loss" in run.trainer.progress_bar_metrics
    steps = [step for step, *_ in rows]
    assert steps == sorted(steps), "rows of Lightning count updates too, or readers would see a restart"


@pytest.mark.parametrize("name", ["checkpoints/epoch=0-step=3.ckpt", "by_step/epoch=0-step=2.ckpt", "alone"])
def test_lightnings_checkpoints_resume_like_ours(whole, tmp_path, name):
    folder, _, halves = whole
    if name == "alone":
        folder, name = tmp_path / "alone", "by_step/epoch=1-step=4.ckpt"
        train(folder, *QUIET[1:], *halves, *theirs(folder), "callbacks=watch", "trainer.max_steps=4")
    train(tmp_path / "resumed", *QUIET, *halves, checkpoint=folder / name)
    assert_equal_ends(whole[0], tmp_path / "resumed")


def test_run_stopped_by_max_time_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    run = train(tmp_path, *LIGHT, "+trainer.max_time.microseconds=1")
    assert run.trainer.global_step == 1 and "by trainer.max_time; resume with the same command" in caplog.text


def test_early_stopping_ends_the_run_and_needs_a_logged_monitor(tmp_path, caplog):
    stops = ["callbacks=[default,early_stopping]", "callbacks.early_stopping.patience=1", "trainer.max_epochs=9"]
    caplog.set_level("INFO")
    run = train(tmp_path / "a", *LIGHT, *stops, "callbacks.early_stopping.min_delta=9")
    assert "stopped early" in caplog.text and "in epoch 2; val/loss was best at" in caplog.text
    assert run.trainer.current_epoch == 2 and (tmp_path / "a/checkpoints/last.ckpt").is_file()
    wrong = [*stops, "callbacks.early_stopping.monitor=val/los", f"paths.run_dir={tmp_path / 'b'}"]
    with pytest.raises(SystemExit) as ended:
        program(composed([*SMALL, *LIGHT, *wrong]))
    assert ended.value.code == 1
    said = (tmp_path / "b/run.log").read_text()
    assert "`val/los` which is not available" in said and "val/loss" in said and "Traceback" not in said


def test_validation_may_count_batches_over_epochs(tmp_path):
    words = [*LIGHT, "trainer.check_val_every_n_epoch=null", "+trainer.val_check_interval=4"]
    train(tmp_path / "a", *words, "trainer.max_steps=2")
    train(tmp_path / "b", *words, checkpoint=last(tmp_path / "a"))
    assert list(logged(tmp_path / "b", "val/loss")) == [4]


def test_overfitting_repeats_the_same_batches(tmp_path, monkeypatch):
    seen = []
    original = RAEModule.training_step

    def training_step(self, batch, batch_idx):
        seen.append((batch["position"].tolist(), batch["image"].float().mean().item()))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(RAEModule, "training_step", training_step)
    run = train(tmp_path, "debug=overfit", *LIGHT[1:], "trainer.max_epochs=3")
    assert seen == 3 * seen[:2] and seen[0] != seen[1] and run.trainer.global_step == 6


def test_fast_dev_run_leaves_neither_checkpoints_nor_metrics(tmp_path):
    debugging = ["trainer.fast_dev_run=2", "trainer.detect_anomaly=true", "trainer.accumulate_grad_batches=2"]
    run = train(tmp_path, *LIGHT, *debugging)
    assert run.trainer.global_step == 2 and not (tmp_path / "checkpoints").exists()
    assert not list(metrics_file.read(tmp_path / "metrics.csv")) and "val/loss" in run.trainer.callback_metrics


def test_profile_is_written_to_the_run_folder(tmp_path):
    train(tmp_path, "debug=profiler", *LIGHT[1:])
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()
    with pytest.raises(UserError, match="trainer.profiler='fast': expected simple"):
        train(tmp_path, *LIGHT, "trainer.profiler=fast")


def test_module_and_data_work_in_a_plain_trainer(tmp_path):
    config = composed([*SMALL, *LIGHT])
    module, data = instantiate(config.model), instantiate(config.data)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1, **options)
    trainer.fit(module, datamodule=data)
    file = trainer.checkpoint_callback.best_model_path
    assert same(RAEModule.load_from_checkpoint(file).state_dict(), module.state_dict())
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(load_trained(file).rae(images), module.reconstruct(images))
    with pytest.raises(UserError, match="datamodule=data"):
        pl.Trainer(max_epochs=1, **options).fit(module, data.train_dataloader())
    copied = pickle.loads(pickle.dumps(module))
    (scores,) = pl.Trainer(limit_val_batches=1, **options).validate(copied, datamodule=data)
    expected = {name: pytest.approx(value) for name, (_, value) in module.scores.items()}
    assert scores == expected and "val/psnr" in scores
    with pytest.raises(UserError, match="precision='bf16-true': expected 32-true"):
        pl.Trainer(precision="bf16-true", **options).validate(instantiate(config.model), datamodule=data)


# -- sweeps


def test_last_checkpoint_may_be_that_of_a_sweep(tmp_path):
    for place in ("runs/2026-01-02/03-04-05", "multiruns/2026-01-03/04-05-06/1"):
        file = tmp_path / place / "checkpoints/last.ckpt"
        file.parent.mkdir(parents=True)
        file.touch()
        (tmp_path / place / "run.json").write_text(json.dumps({"experiment_name": "mine"}))
    os.utime(tmp_path / "runs/2026-01-02/03-04-05/checkpoints/last.ckpt", (1, 1))
    assert "multiruns" in str(find_checkpoint("last", str(tmp_path), "mine"))


def test_run_returns_the_requested_metric(tmp_path):
    words = [*SMALL, *LIGHT, LOGS, "optimized_metric=mine/val", "trainer.max_steps=3", "tags=[ablation, small]"]
    value = program(composed([*words, f"paths.run_dir={tmp_path}"]))
    record = json.loads((tmp_path / "run.json").read_text())
    assert value == record["result"]["mine/val"] == 0.5 and record["tags"] == ["ablation", "small"]


@pytest.mark.skipif(importlib.util.find_spec("optuna") is not None, reason="the Optuna plugin is installed")
def test_missing_plugin_ends_in_one_message():
    said = python("src/train.py", "hparams_search=optuna", code=1)
    assert len(said.splitlines()) == 1 and "pip install -e '.[optuna]'" in said


# -- Weights & Biases


class StandIn(ModuleType):
    """The part of wandb that Lightning's logger calls."""

    def __init__(self):
        super().__init__("wandb")
        self.run, self.inits, self.logged, self.finished = None, [], [], []
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.config = self

    def init(self, **options):
        self.inits.append(options)
        self.id = options["id"] or f"run{len(self.inits)}"
        self.run, self.name = self, options["name"]
        return self

    def update(self, *_, **__):
        """A method of `config`."""

    def log(self, values, **_):
        self.logged.append((self.id, values))

    def finish(self, exit_code=None):
        self.finished.append(exit_code)
        self.run = None

    def Image(self, *_, **__):
        return "image"


def test_resume_continues_the_same_wandb_run(tmp_path, monkeypatch):
    wandb = StandIn()
    parts = {"wandb": wandb, "wandb.sdk": ModuleType("wandb.sdk"), "wandb.sdk.lib": ModuleType("wandb.sdk.lib")}
    parts |= {"wandb.wandb_run": ModuleType("wandb.wandb_run")}
    parts["wandb.sdk.lib"].RunDisabled = parts["wandb.wandb_run"].Run = StandIn
    StandIn.define_metric = lambda self, *_, **__: None
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", True)
    words = [*SMALL, "~callbacks.rfid", "logger=wandb", *LIGHT[2:], f"paths.log_dir={tmp_path}", "tags=[mine]"]
    words += ["trainer.limit_train_batches=1"]
    program(composed([*words, "trainer.max_epochs=1"]))
    program(composed([*words, "ckpt_path=last"]))
    program(composed(words))
    assert [options["id"] for options in wandb.inits] == [None, "run1", None]
    assert wandb.inits[0]["tags"] == ["mine"] and wandb.inits[1]["resume"] == "allow"
    ids = [name for name, values in wandb.logged if "val/loss" in values]
    assert ids == ["run1", "run1", "run3", "run3"] and wandb.finished == [0, 0, 0]
    records = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/*/run.json")]
    assert sorted(record["wandb_run"] for record in records) == ["run1", "run1", "run3"]
    record = next(iter(tmp_path.glob("runs/*/*/run.json")))
    record.write_text("[]")  # damaged
    program(composed([*words, f"ckpt_path={record.parent / 'checkpoints/last.ckpt'}"]))
    assert wandb.inits[-1]["id"] is None

    def refuse(self, **_):
        raise type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})("No API key\nconfigured.")

    monkeypatch.setattr(StandIn, "init", refuse)
    with pytest.raises(UserError, match=r"Weights & Biases: No API key configured\. .*WANDB_MODE=offline"):
        train(tmp_path / "refused", "logger=wandb")


# -- the terminal


def test_terminal_shows_one_bar_and_the_log_has_the_metrics(tmp_path, monkeypatch, capfd):
    bars, make = [], progress.progress_bar
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(progress, "progress_bar", lambda *columns: (bars.append(make(*columns)), bars[-1])[1])
    program(composed([*SMALL, *LIGHT, f"paths.run_dir={tmp_path}"]))
    (bar,) = bars
    assert [(task.total, task.completed) for task in bar.tasks] == [(6, 6)]  # one for the whole run
    written, shown = (tmp_path / "run.log").read_text(), capfd.readouterr().err
    for step in range(1, 7):
        assert f"step {step}: grad_norm" in written and f"step {step}: grad_norm" not in shown
    assert sum("UNTRAINED" in line and " W " in line for line in shown.splitlines()) == 1
    assert "site-packages" not in shown + written
    with make():
        print("word " * 60, file=sys.stderr)
    assert "word " * 60 in capfd.readouterr().err  # not wrapped: a shell runs only the first line
