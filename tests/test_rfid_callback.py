"""rFID during training: every option works as documented, and training is not disturbed."""

import json
import logging
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from src import eval_rfid
from src.callbacks.rfid_callback import RFIDCallback, run_id
from src.core.errors import UserError
from src.core.weights import read
from src.metrics.inception import InceptionFeatures
from tests.tiny_models import two_processes
from tests.training import SMALL, assert_equal_ends, last, logged, same, train, train_stage2


def rfid(**options: object) -> list[str]:
    """Return overrides: 6 images at the end of each epoch, nothing saved, unless `options` differ."""
    values = {
        "rfid_every_n_steps": 0, "rfid_every_epoch": True, "rfid_num_samples": 6, "rfid_batch_size": 4,
        "rfid_save_samples": False, "inception_weights": "tiny", **options,
    }  # fmt: skip
    return ["logger=csv", *(f"callbacks.rfid.{name}={value}" for name, value in values.items())]


def everything(module) -> dict:
    """Return all state that an evaluation could disturb."""
    backends = torch.backends
    return {
        "rng": [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy()), random.getstate()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "needs": [p.requires_grad for p in module.parameters()],
        "switches": [backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.conv.fp32_precision, torch.is_grad_enabled()],
        "modes": [part.training for part in module.modules()],
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
    }  # fmt: skip


def watched(hook):
    """Wrap a hook of Lightning to check that it leaves everything as it was."""

    def watching(callback, trainer, pl_module, *more):
        pl_module.ema_decoder.train()  # as if left in train mode
        before = everything(pl_module)
        hook(callback, trainer, pl_module, *more)
        assert same(everything(pl_module), before)
        pl_module.ema_decoder.eval()

    return watching


def test_training_with_and_without_rfid_is_bit_equal(stage1_run, tmp_path, monkeypatch):
    for name in ("on_train_batch_end", "on_train_epoch_end", "on_train_end"):
        monkeypatch.setattr(RFIDCallback, name, watched(getattr(RFIDCallback, name)))
    pictures = {"rfid_save_samples": True, "rfid_output_dir": tmp_path / "samples"}
    train(tmp_path / "with", *rfid(rfid_every_n_steps=1, full_at_end=True, **pictures))
    assert len(logged(tmp_path / "with", "rfid_untrained/score")) == 6
    assert logged(tmp_path / "with", "rfid_untrained_full/images") == {6: 58}
    assert_equal_ends(stage1_run[0], tmp_path / "with")


def test_schedule_and_written_files(tmp_path, caplog, monkeypatch):
    seen, outputs = [], InceptionFeatures.outputs
    monkeypatch.setattr(InceptionFeatures, "outputs", lambda self, x: (seen.append(len(x)), outputs(self, x))[1])
    folder = tmp_path / "2026-01-02" / "03-04-05"
    pictures = {"rfid_save_samples": True, "save_samples_count": 3, "rfid_output_dir": tmp_path / "samples"}
    with caplog.at_level(logging.INFO):
        run = train(folder, *rfid(rfid_every_n_steps=2, **pictures))
    scores = logged(folder, "rfid_untrained/score")
    assert sorted(scores) == [2, 3, 4, 6]  # 3 and 6 are the ends of epochs
    assert sum(seen) == 6 * (1 + 4)  # originals once only, then four reconstructions of them
    assert set(logged(folder, "rfid_untrained/images").values()) == {6}
    for name in ("psnr", "ssim", "lpips", "seconds"):
        assert sorted(logged(folder, f"rfid_untrained/{name}")) == [2, 3, 4, 6]
    assert not any(name.startswith("rfid/") for name in run.module.scores)  # that name is for the published network
    samples = tmp_path / "samples" / "2026-01-02_03-04-05"
    assert sorted(p.name for p in samples.iterdir()) == ["epoch_001", "epoch_002", "step_0000002", "step_0000004"]
    pairs = [f"{i:05d}_{kind}.png" for i in range(3) for kind in ("original", "reconstruction")]
    assert sorted(p.name for p in (samples / "epoch_002").iterdir()) == sorted([*pairs, "sheet.png"])
    lines = [r.getMessage() for r in caplog.records]
    said = [line for line in lines if "rfid_untrained: " in line]
    assert len(said) == 4 and all("over 6 images" in line and line.endswith(" s") for line in said)
    assert sum("fewer than its" in line for line in lines) == 1
    no_gpu = sum("no CUDA device is visible: rFID runs on" in line for line in lines)
    assert no_gpu == (0 if torch.cuda.is_available() else 1)
    checkpoint = read(last(folder))
    state = next(v for k, v in checkpoint["callbacks"].items() if "RunCheckpoint" in k)
    assert state == {"monitor": "rfid_untrained/score", "best": pytest.approx(min(scores.values()))}
    assert read(folder / "checkpoints" / "best.ckpt")["global_step"] == min(scores, key=scores.get)


def test_steps_count_generator_updates_under_accumulation_and_older_configs_open(tmp_path, caplog):
    """An untrained network of a smaller width is the tiny one."""
    accumulated = ["data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=6"]
    old = ["+callbacks.rfid.inception_width=0.125", "model.disc_weight=0"]
    options = rfid(rfid_every_n_steps=2, rfid_every_epoch=False, inception_weights="untrained")
    train(tmp_path, *options, *accumulated, *old)
    assert sorted(logged(tmp_path, "rfid_untrained/score")) == [2, 4, 6]
    assert "fewer than its 256 feature dimensions" in caplog.text


def test_disabled_rfid_needs_no_file_and_best_follows_the_validation_loss(tmp_path):
    missing = {"inception_weights": "pretrained", "inception_path": "nowhere.pth"}
    run = train(tmp_path, *rfid(rfid_every_epoch=False, **missing))
    assert not any("rfid" in name for name in run.module.scores)
    states = read(tmp_path / "checkpoints" / "best.ckpt")["callbacks"]
    assert next(v for k, v in states.items() if "RunCheckpoint" in k)["monitor"] == "val/loss"


def test_script_gives_the_score_of_the_callback(tmp_path):
    """Over everything at the end: the script takes EMA weights, the same images and protocol without further options."""
    options = [*rfid(rfid_every_epoch=False, full_at_end=True), "trainer.max_epochs=1", "model.ema_decay=0.5"]
    run = train(tmp_path, *options, "callbacks.rfid.quantization=truncate", "data.exif=ignore")
    assert run.module.scores["rfid_untrained_full/images"] == (3, 58) and run.datamodule.val_size == 58
    assert "rfid_untrained/score" not in run.module.scores  # never in one curve with scores of fewer images
    line = f"--checkpoint {last(tmp_path)} --data_dir data/dummy_dataset_hf --device cpu --num_workers 0"
    assert eval_rfid.main(shlex.split(f"{line} --inception_weights tiny --json {tmp_path}/a.json")) == 0
    used = json.loads((tmp_path / "a.json").read_text())
    (result,) = used["results"]
    assert (result["split"], result["images"]) == ("held_out", 58)
    assert (used["exif"], used["quantization"]) == ("ignore", "truncate")
    for theirs, ours in (("rfid_untrained", "score"), ("psnr", "psnr"), ("ssim", "ssim"), ("lpips_untrained", "lpips")):
        assert result[theirs] == pytest.approx(run.module.scores[f"rfid_untrained_full/{ours}"][1], rel=1e-4)


def test_missing_file_is_an_error_at_the_start_with_the_command(tmp_path):
    with pytest.raises(UserError) as caught:
        train(tmp_path, *rfid(inception_weights="pretrained", inception_path=f"{tmp_path}/no.pth"))
    for words in (
        str(tmp_path / "no.pth"), "python scripts/download_weights.py --experiment rae_dummy", "callbacks.rfid.rfid_every_n_steps=0",
        "callbacks.rfid.rfid_every_epoch=false",
    ):  # fmt: skip
        assert words in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


def test_training_images_are_used_only_if_nothing_is_held_out(tmp_path, caplog):
    nothing_held_out = ["data.train_split=1.0", "trainer.max_epochs=1"]
    with pytest.raises(UserError, match="use_train_dataloader=true"):
        train(tmp_path / "refused", *rfid(use_train_dataloader=False), *nothing_held_out)
    run = train(tmp_path / "taken", *rfid(use_train_dataloader=True), *nothing_held_out)
    assert run.module.scores["rfid_untrained/images"] == (3, 6)
    assert "rFID is measured on training images" in caplog.text


ARGUMENTS = {
    "rfid_every_n_steps": 1000, "rfid_every_epoch": True, "rfid_num_samples": 1000, "rfid_batch_size": 64, "rfid_device": "cuda",
    "rfid_output_dir": "x", "rfid_save_samples": True, "save_samples_count": 64, "use_train_dataloader": True, "full_at_end": False,
    "quantization": "round", "inception_path": None, "inception_weights": "pretrained",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [("rfid_every_n_steps", -1), ("rfid_num_samples", 1), ("rfid_batch_size", 0), ("rfid_device", "tpu"), ("rfid_device", "gpu0"),
     ("save_samples_count", -2), ("quantization", "floor"), ("inception_weights", "random"), ("rfid_num_samples", 2.5)],
)  # fmt: skip
def test_invalid_values_are_rejected(key, value):
    with pytest.raises(UserError, match=rf"callbacks\.rfid\.{key}={value!r}: expected"):
        RFIDCallback(**(ARGUMENTS | {key: value}))


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/a/logs/runs/2026-01-02/03-04-05-2", "2026-01-02_03-04-05-2"),
        ("/a/multiruns/2026-01-02/03-04-05/7", "2026-01-02_03-04-05_7"),
        ("/a/mine", "mine"),
    ],
)
def test_run_id(folder, expected):
    assert run_id(Path(folder)) == expected


def test_stage_2_is_refused_before_it_trains(autoencoder, tmp_path):
    with pytest.raises(UserError, match="callbacks=generation"):
        train_stage2(tmp_path, autoencoder, "callbacks=default", "callbacks.rfid.inception_weights=tiny")


@pytest.mark.slow
def test_two_processes_give_the_score_of_one(tmp_path):
    """Learning rates near 0, so that all weights are the same; 7 images, so that the shares differ."""
    still = ["optimizer.lr=1e-12", "scheduler.base_lr=1e-12", "scheduler.final_lr=0", "disc_weight=0"]
    options = [*rfid(rfid_num_samples=7, rfid_save_samples=True), *(f"model.{key}" for key in still)]
    options += ["trainer.max_epochs=1", "trainer.limit_val_batches=0"]
    one = tmp_path / "one"
    train(one, *options, f"callbacks.rfid.rfid_output_dir={one}/samples")
    options += ["data.batch_size=2", f"callbacks.rfid.rfid_output_dir={tmp_path}/samples", f"paths.log_dir={tmp_path}"]
    two_processes("src/train.py", *SMALL, *options)
    (two,) = (tmp_path / "runs").glob("*/*")
    names = ("score", "psnr", "ssim", "lpips", "images")
    a, b = ({name: logged(run, f"rfid_untrained/{name}")[3] for name in names} for run in (one, two))
    assert a["images"] == 7 and b == pytest.approx(a, rel=1e-4)
    folders = (one / "samples", tmp_path / "samples")
    a, b = ({p.name: p.read_bytes() for p in folder.glob("*/epoch_001/*_original.png")} for folder in folders)
    assert len(a) == 7 and a == b  # the same images from both
