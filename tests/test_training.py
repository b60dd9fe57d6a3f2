"""Whole runs of the training program on made-up data."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.core import metrics_file
from src.core.images import bytes_to_unit
from src.core.weights import read
from tests.training import train

OFF = "~callbacks.rfid"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder, OFF, "model.sample_every=2", "trainer.num_sanity_val_steps=-1")


def test_what_is_logged_under_which_name_at_which_step(run):
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


def test_what_a_run_leaves(run):
    folder, fitted = run
    for name in (
        "run.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "checkpoints/epoch_001.ckpt",
        "checkpoints/epoch_002.ckpt",
        "samples/step_0000006.png",
    ):
        assert (folder / name).is_file(), name
    record = json.loads((folder / "run.json").read_text())
    assert (
        record["packages"]["torch"] == torch.__version__.split("+")[0]
        or record["packages"]["torch"] == torch.__version__
    )
    assert record["data"]["train"] == 230 and record["data"]["validation"] == 58
    assert fitted.trainer.global_step == 6


def test_val_loss_is_l1_plus_weighted_lpips_of_the_average(run):
    _, fitted = run
    scores = {name: value for name, (_, value) in fitted.module.scores.items()}
    weight = fitted.module.settings.step.perceptual_weight
    assert scores["val/loss"] == pytest.approx(scores["val/l1"] + weight * scores["val/lpips"])
    batch = next(iter(fitted.datamodule.val_dataloader()))
    images = bytes_to_unit(batch["image"])
    l1 = (fitted.module.reconstruct(images) - images).abs().mean()
    assert scores["val/l1"] == pytest.approx(float(l1), rel=1e-5)
    online = (fitted.module.reconstruct(images, weights="online") - images).abs().mean()
    assert abs(float(online - l1)) > 1e-6


def test_frozen_stays_frozen(run):
    folder, fitted = run
    module = fitted.module.train()
    frozen = {"encoder": module.rae.encoder, "lpips": module.lpips, "trunk": module.discriminator.trunk}
    optimised = {
        id(p) for optimizer in fitted.trainer.optimizers for group in optimizer.param_groups for p in group["params"]
    }
    averaged = {name for name, _ in module.ema_decoder.named_parameters()}
    names = read(folder / "checkpoints" / "last.ckpt")["state_dict"].keys()
    for part in frozen.values():
        assert not any(m.training for m in part.modules())
        assert all(not p.requires_grad and p.grad is None and id(p) not in optimised for p in part.parameters())
    assert averaged == {name for name, _ in module.rae.decoder.named_parameters()}
    assert not [n for n in names if n.startswith(("rae.encoder", "lpips", "discriminator.trunk"))]


def test_learning_rates_in_the_log_are_those_of_the_schedule(run):
    folder, fitted = run
    events = EventAccumulator(str(folder)).Reload()
    schedule = fitted.module.settings.scheduler.at(3)
    assert [e.value for e in events.Scalars("lr/generator")] == pytest.approx(
        [schedule.lr(s) for s in range(6)], rel=1e-5
    )
    own = fitted.module.settings.disc_scheduler.at(3)
    assert [e.value for e in events.Scalars("lr/discriminator")] == pytest.approx(
        [own.lr(max(s - 1, 0)) for s in range(6)], rel=1e-5
    )


def test_old_epoch_checkpoints_are_pruned(tmp_path):
    train(
        tmp_path,
        OFF,
        "logger=csv",
        "trainer.max_epochs=4",
        "trainer.limit_train_batches=1",
        "callbacks.checkpoint.keep_epochs=2",
    )
    assert sorted(f.name for f in (tmp_path / "checkpoints").glob("epoch_*")) == ["epoch_003.ckpt", "epoch_004.ckpt"]


def test_accumulation_counts_updates_and_equals_one_batch_without_the_gan(tmp_path):
    """Without adaptive weights the gradient of two halves is that of the whole."""
    base = [OFF, "logger=csv", "model.disc_weight=0", "trainer.max_epochs=1"]
    whole = train(tmp_path / "whole", *base, "data.batch_size=4", "trainer.limit_train_batches=3")
    halves = train(
        tmp_path / "halves",
        *base,
        "data.batch_size=2",
        "trainer.limit_train_batches=7",
        "trainer.accumulate_grad_batches=2",
    )
    assert whole.trainer.global_step == halves.trainer.global_step == 3  # the seventh micro-batch is left over
    moments = [r.trainer.optimizers[0].state_dict()["state"] for r in (whole, halves)]
    for mine, theirs in zip(moments[0].values(), moments[1].values(), strict=True):
        assert (mine["exp_avg"] - theirs["exp_avg"]).abs().max() < 1e-5
    rows = metrics_file.read(tmp_path / "halves" / "metrics.csv")
    assert [step for step, name, *_ in rows if name == "train/loss"] == [1, 2, 3]


def test_bf16_and_16_on_a_cpu(tmp_path):
    for precision in ("bf16", "16"):
        fitted = train(tmp_path / precision, OFF, "logger=csv", f"trainer.precision={precision}", "trainer.max_steps=3")
        assert fitted.trainer.precision == "bf16-mixed"
        assert all(torch.isfinite(p).all() for p in fitted.module.rae.decoder.parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.disc_fake=reuse"], ["model.loss_chunk_size=1"], ["model.activation_checkpointing=true"], ["model.train_positions=true"],
        ["model.disc_updates=2"], ["model.disc_loss=softplus", "model.gen_loss=softplus"], ["model.perceptual_weight=0"],
        ["model.disc_weight=0"], ["model.scheduler.type=linear"], ["model.disc_arch.augment.cutout=0.5"], ["model.noise_tau=0"],
    ],
    ids=lambda o: o[0],
)  # fmt: skip
def test_options_train(tmp_path, overrides):
    fitted = train(tmp_path, OFF, "logger=csv", "trainer.max_steps=3", "callbacks=no_checkpoint", *overrides)
    assert fitted.trainer.global_step == 3
    assert all(torch.isfinite(value) for value in fitted.module.train_terms.values())


def test_disc_updates_draw_anew_and_move_the_discriminator_further(tmp_path):
    heads = []
    for updates in (1, 2):
        fitted = train(
            tmp_path / str(updates), OFF, "logger=csv", "trainer.max_steps=2", f"model.disc_updates={updates}"
        )
        state = fitted.trainer.optimizers[1].state_dict()["state"]
        heads.append(int(next(iter(state.values()))["step"]))
    assert heads == [1, 2]


def test_the_siglip_dummy_trains(tmp_path):
    """As shipped, but for a smaller batch."""
    fitted = train(
        tmp_path,
        "experiment=rae_siglip_dummy",
        OFF,
        "data.num_workers=0",
        "data.batch_size=2",
        "trainer.max_steps=3",
        "trainer.accelerator=cpu",
        small=False,
    )
    assert fitted.trainer.precision == "bf16-mixed"
    assert fitted.module.rae.geometry.tokens == 729
    assert not (tmp_path / "checkpoints").exists()


def test_a_compiled_step_has_the_same_names_and_numbers(tmp_path):
    """A decoder of one block and no loss networks: compiling is slow, and one block is compiled as many are."""
    config = {
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
        "layer_norm_eps": 1e-12,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = [OFF, "logger=csv", "callbacks=no_checkpoint", "trainer.max_steps=2", "trainer.limit_val_batches=0", f"model.decoder_config_path={tmp_path}",
            "model.disc_weight=0", "model.perceptual_weight=0"]  # fmt: skip
    plain = train(tmp_path / "plain", *base)
    compiled = train(tmp_path / "compiled", *base, "model.compile=true")
    assert compiled.module.rae.decoder.decoder_layers[0]._compiled_call_impl is not None
    assert plain.module.state_dict().keys() == compiled.module.state_dict().keys()
    assert float(plain.module.train_terms["train/loss"]) == pytest.approx(
        float(compiled.module.train_terms["train/loss"]), rel=1e-5
    )
    for mine, theirs in zip(
        plain.trainer.optimizers[0].state_dict()["state"].values(),
        compiled.trainer.optimizers[0].state_dict()["state"].values(),
        strict=True,
    ):
        assert (mine["exp_avg"] - theirs["exp_avg"]).abs().max() < 1e-5
