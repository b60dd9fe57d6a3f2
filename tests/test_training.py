"""Whole training runs on dummy data."""

import json
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.core.weights import PROJECT_ROOT, read
from src.metrics.reconstruction import ReconstructionScore
from src.training.record import summary
from src.training.stage1_step import TrainingStep
from tests.training import QUIET, last, logged, train

OFF = "~callbacks.rfid"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    warmup = ["model.disc_scheduler.warmup_epochs=1", "model.disc_scheduler.warmup_from_zero=true"]
    return folder, train(folder, OFF, "model.sample_every=2", "trainer.num_sanity_val_steps=-1", *warmup)


def test_logged_names_and_steps(run):
    folder, _ = run
    events = EventAccumulator(str(folder)).Reload()
    scalars = set(events.Tags()["scalars"])
    expected = {
        *(f"train/{n}" for n in ("loss", "l1", "lpips", "gan", "adaptive_weight", "grad_norm")),
        *(f"disc/{n}" for n in ("loss", "accuracy", "logits_real", "logits_fake")),
        "lr/generator", "lr/discriminator",
        *(f"perf/{n}" for n in ("images_per_s", "data_wait", "memory_gb")),
        *(f"val/{n}" for n in ("loss", "l1", "lpips", "psnr", "ssim")),
    }  # fmt: skip
    assert expected <= scalars
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("val/loss")] == [0, 3, 6]
    assert [e.step for e in events.Scalars("train/gan")] == [2, 3, 4, 5, 6]  # from the second update on
    assert {e.step for e in events.Images("samples")} == {2, 4, 6}


def test_files_and_record_of_a_run(run, caplog):
    folder, fitted = run
    caplog.set_level("INFO")
    summary(fitted.trainer, fitted.module)
    assert "step_0000006.png (originals above reconstructions)" in caplog.text
    checkpoints = {file.name for file in (folder / "checkpoints").iterdir()}
    assert checkpoints == {"last.ckpt", "best.ckpt", "epoch_001.ckpt", "epoch_002.ckpt"}
    assert (folder / "samples/step_0000006.png").is_file()
    record = json.loads((folder / "run.json").read_text())
    assert torch.__version__.startswith(record["packages"]["torch"])
    assert record["data"]["train"] == 230 and record["data"]["validation"] == 58
    assert fitted.trainer.global_step == 6
    assert not fitted.module.lpips.fused and not fitted.module.disc_scaler.is_enabled()  # by default


def test_added_loss_term_is_trained_logged_and_validated(tmp_path, monkeypatch):
    """Its weight outweighs the others: the decoder learns grey, whatever the images are."""
    original = TrainingStep.reconstruction_terms
    grey = (100.0, lambda output, target: (output - 0.5).square())
    monkeypatch.setattr(TrainingStep, "reconstruction_terms", lambda *args: original(*args) | {"grey": grey})
    fitted = train(tmp_path, *QUIET, "callbacks=no_checkpoint", "model.disc_weight=0", "model.ema_decay=0")
    terms, scores = fitted.module.train_terms, {name: value for name, (_, value) in fitted.module.scores.items()}
    weight = fitted.module.settings.perceptual_weight
    for name, found in (("train", {n: float(v) for n, v in terms.items()}), ("val", scores)):
        total = found[f"{name}/l1"] + weight * found[f"{name}/lpips"] + 100 * found[f"{name}/grey"]
        assert found[f"{name}/loss"] == pytest.approx(total, rel=1e-5)
    grey = logged(tmp_path, "train/grey")
    assert grey[6] < 0.7 * grey[1]


def test_logged_learning_rates_are_those_of_the_schedule(run):
    folder, fitted = run
    events = EventAccumulator(str(folder)).Reload()
    settings = fitted.module.settings
    generator = [settings.scheduler.lr(step, 3) for step in range(6)]
    discriminator = [settings.disc_scheduler.lr(max(step - 1, 0), 3) for step in range(6)]  # counts its own updates
    assert discriminator[0] == discriminator[1] < discriminator[2]
    assert [e.value for e in events.Scalars("lr/generator")] == pytest.approx(generator, rel=1e-5)
    assert [e.value for e in events.Scalars("lr/discriminator")] == pytest.approx(discriminator, rel=1e-5)
    used = [optimizer.param_groups[0]["lr"] for optimizer in fitted.trainer.optimizers]
    assert used == pytest.approx([generator[-1], discriminator[-1]])


def test_validation_scores_are_those_of_the_ema_weights(run):
    module, pixels = run[1].module, next(iter(run[1].datamodule.val_dataloader()))["image"]
    images, score = pixels / 255, ReconstructionScore(lpips=module.lpips)
    output = module.rae.decode_raw(module.rae.encode_raw(images), module.ema_decoder)
    score.update(pixels, output)
    expected = {name.removesuffix("_untrained"): value for name, value in score.compute().items() if name != "images"}
    expected["l1"] = (output - images).abs().mean().item()
    expected["loss"] = expected["l1"] + module.settings.perceptual_weight * module.scores["val/lpips"][1]
    for name, value in expected.items():  # LPIPS is of 8-bit images here, of the decoder's floats there
        assert module.scores[f"val/{name}"] == (6, pytest.approx(value, rel=1e-2 if name == "lpips" else 1e-4)), name


def test_old_epoch_checkpoints_are_pruned_by_number(stage1_run, tmp_path, caplog):
    """Of three or four digits."""
    caplog.set_level("INFO")
    content = read(last(stage1_run[0]))
    epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]
    epochs.update(dict.fromkeys(epochs, 996))
    torch.save(content, tmp_path / "late.ckpt")
    short = ["trainer.max_epochs=1002", "trainer.limit_train_batches=1", "trainer.limit_val_batches=0"]
    every = ["callbacks.checkpoint.every_n_epochs=2", "callbacks.checkpoint.keep_epochs=2"]
    train(tmp_path, *QUIET, *short, *every, checkpoint=tmp_path / "late.ckpt")
    assert {f.name for f in (tmp_path / "checkpoints").glob("epoch_*")} == {"epoch_1000.ckpt", "epoch_1002.ckpt"}
    assert "Nothing was evaluated: best.ckpt is" not in caplog.text  # it was there before the end


def test_accumulation_counts_updates_and_equals_one_batch_without_the_gan(tmp_path):
    """Without adaptive weights the gradient of two halves is that of the whole."""
    base = [*QUIET, "model.disc_weight=0", "trainer.max_epochs=1"]
    whole = train(tmp_path / "whole", *base, "data.batch_size=4", "trainer.limit_train_batches=3")
    halved = ["data.batch_size=2", "trainer.limit_train_batches=7", "trainer.accumulate_grad_batches=2"]
    halves = train(tmp_path / "halves", *base, *halved)
    assert whole.trainer.global_step == halves.trainer.global_step == 3  # the seventh micro-batch is left over
    assert_same_moments(whole, halves)
    losses = [logged(tmp_path / name, "train/loss") for name in ("whole", "halves")]
    assert list(losses[1]) == [1, 2, 3]
    assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-5)  # the mean over micro-batches


def assert_same_moments(first, second):
    """Compare Adam's first moments, to 1 % of the largest: where L1 is near 0, rounding flips a pixel's gradient."""
    mine, theirs = (
        torch.cat([s["exp_avg"].flatten() for s in run.trainer.optimizers[0].state_dict()["state"].values()])
        for run in (first, second)
    )
    assert (mine - theirs).abs().max() < 1e-2 * theirs.abs().max()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.disc_fake=reuse", "model.loss_chunk_size=1", "model.activation_checkpointing=true", "model.train_positions=true",
         "model.disc_updates=2", "model.disc_scheduler.warmup_epochs=0", "model.disc_loss=softplus", "model.gen_loss=softplus", "model.scheduler.type=linear",
         "model.disc_arch.augment.cutout=0.5", "model.noise_tau=0"],
        ["model.perceptual_weight=0"],
    ],
    ids=["all", "no LPIPS"],
)  # fmt: skip
def test_options_train(tmp_path, overrides):
    fitted = train(tmp_path, *QUIET, "trainer.max_steps=3", "callbacks=no_checkpoint", *overrides)
    assert fitted.trainer.global_step == 3
    assert all(torch.isfinite(value) for value in fitted.module.train_terms.values())
    state = fitted.trainer.optimizers[1].state_dict()["state"]
    updates = fitted.module.settings.disc_updates
    assert int(next(iter(state.values()))["step"]) == 2 * updates  # it starts in the second step
    rate = fitted.module.settings.disc_scheduler.lr(2 * updates - 1, 3)  # its schedule counts its own updates
    assert fitted.trainer.optimizers[1].param_groups[0]["lr"] == rate


def test_parts_that_never_start(tmp_path):
    options = [f"model.{key}=inf" for key in ("lpips_start_epoch", "disc_upd_start_epoch", "disc_start_epoch")]
    fitted = train(tmp_path, *QUIET, "callbacks=no_checkpoint", "trainer.max_steps=4", *options)
    assert {n for n in fitted.module.train_terms if not n.endswith("norm")} == {"train/l1", "train/loss"}
    assert fitted.module.learning_rates(3)["discriminator"] == fitted.module.settings.disc_scheduler.lr(0, 3)


@pytest.mark.slow
def test_siglip_dummy_trains(tmp_path):
    """As shipped, except for a smaller batch."""
    smaller = ["data.num_workers=0", "data.batch_size=2", "trainer.max_steps=3", "trainer.accelerator=cpu"]
    fitted = train(tmp_path, "experiment=rae_siglip_dummy", OFF, *smaller, small=False)
    assert fitted.trainer.precision == "bf16-mixed"
    assert fitted.module.rae.geometry.tokens == 729
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_compiled_step_has_the_same_names_and_numbers(tmp_path, monkeypatch):
    """With a decoder of one block and no loss networks, as compiling is slow, and without generating code from the graphs:
    `make gpu` and the GPU report compile completely."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = json.loads((PROJECT_ROOT / "configs/decoder/tiny/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_num_hidden_layers": 1}))
    base = [*QUIET, "callbacks=no_checkpoint", "trainer.max_steps=2", "trainer.limit_val_batches=0", f"model.decoder_config_path={tmp_path}",
            "model.disc_weight=0", "model.perceptual_weight=0"]  # fmt: skip
    plain = train(tmp_path / "plain", *base)
    compiled = train(tmp_path / "compiled", *base, "model.compile=true")
    assert compiled.module.rae.decoder.decoder_layers[0]._compiled_call_impl is not None
    assert plain.module.state_dict().keys() == compiled.module.state_dict().keys()
    losses = [float(run.module.train_terms["train/loss"]) for run in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_moments(plain, compiled)
