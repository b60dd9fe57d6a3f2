"""The config `model`: all problems at once, named by their command-line keys, and keys that have been removed."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from src.core.errors import UserError
from src.core.weights import read
from src.training.settings import ModelSettings
from src.training.stage1 import RAEModule
from tests.training import QUIET, assert_equal_ends, composed, train


@pytest.fixture(scope="module")
def node():
    config = composed(["experiment=rae_dummy", "paths.run_dir=somewhere"])
    return {k: v for k, v in OmegaConf.to_container(config.model, resolve=True).items() if k != "_target_"}


def parse(node, **changes):
    return ModelSettings.parse(node | changes)


def test_groups_and_types(node):
    settings = parse(node, gradient_clip_val=1, disc_start_epoch=math.inf)
    assert settings.image_size == settings.decoder_patch_size * 8 and settings.optimizer.betas == (0.9, 0.95)
    assert settings.gradient_clip_val == 1.0 and settings.disc_loss == "hinge"
    assert settings.start_steps(3) == {"lpips": 0, "disc": 42, "gan": math.inf}
    assert parse(node, disc_upd_start_epoch=0.5).start_steps(3)["disc"] == 2  # rounded


def test_every_problem_is_named_at_once(node):
    changes = {
        "noise_tau": -1, "train_positions": 1, "perceptual_weight": "high", "disc_fake": "resue", "disc_loss": "wgan",
        "accumulate_grad_batches": 0, "gradient_clip_val": -1, "disc_weight": math.inf, "loss_chunk_size": 0,
        "adaptive_weight": "foo", "ema_decay": 1, "lpips_start_epoch": math.nan, "image_size": "64px",
        "optimizer": {"lr": 0, "betas": [0.9, 1.0], "weight_decay": 0}, "scheduler": node["scheduler"] | {"final_lr": 1.0},
        "disc_updates": 10**12, "lpips_arch": None, "layer_subset": {"kind": "none"}, "disc_weigth": 1, "foo": 2,
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        parse({k: v for k, v in node.items() if k != "seed"}, **changes)
    said = [
        "seed is missing.", "model.noise_tau=-1: expected at least 0.", "model.train_positions=1: expected true or false.",
        "model.perceptual_weight='high': expected a number.", "model.disc_fake='resue': expected fresh or reuse.",
        "model.disc_loss='wgan': expected hinge, softplus,", "model.disc_updates=1000000000000: expected at most 100.",
        "trainer.accumulate_grad_batches=0: expected at least 1.", "trainer.gradient_clip_val=-1: expected more than 0 or null.",
        "model.disc_weight=inf: expected a finite number.", "model.loss_chunk_size=0: expected at least 1 or null.",
        "model.adaptive_weight='foo': expected global or per_rank.", "model.ema_decay=1: expected less than 1.",
        "model.lpips_start_epoch=nan: expected at least 0.", "data.image_size='64px': expected a whole number.",
        "model.optimizer.lr=0: expected more than 0.", "model.optimizer.betas.1=1.0: expected less than 1.",
        "model.scheduler: final_lr=1 exceeds the learning rate 0.001", "model.lpips_arch=null: expected a node of keys.",
        "model.layer_subset.keep_probability is missing.", "unknown key model.disc_weigth (did you mean disc_weight?).",
        "unknown key model.foo. Known keys: accumulate_grad_batches, ",
    ]  # fmt: skip
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(said)} problems:"
    for words in said:
        assert sum(line.startswith(f"  {words}") for line in lines) == 1, f"{words}\n{caught.value}"


def test_keys_are_checked_before_sizes_and_sizes_before_weights(node):
    with pytest.raises(UserError, match=r"^unknown key model.foo"):
        RAEModule.check_arguments(node | {"foo": 1, "image_size": 100})
    with pytest.raises(UserError, match="image_size=100 is not a multiple"):
        RAEModule.check_arguments(node | {"image_size": 100, "pretrained_decoder_path": "nowhere.pt"})


REMOVED = {
    "lpips_arch": {"vgg_path": None, "linear_path": None, "weights": "untrained", "channels": [4, 8, 8, 16, 16]},
    "disc_arch": {"arch": {"recipe": "tiny", "weights": "untrained"}},
}


def test_checkpoint_with_removed_keys_resumes_bit_equal_without_a_warning(stage1_run, tmp_path, caplog):
    folder, _ = stage1_run
    old = read(folder / "checkpoints" / "epoch_001.ckpt")
    model = old["config"]["model"]
    model |= {"lpips_arch": REMOVED["lpips_arch"], "_target_": "src.models.rae_module.RAEModule"}
    model["disc_arch"]["arch"] |= REMOVED["disc_arch"]["arch"]
    torch.save(old, tmp_path / "old.ckpt")
    caplog.clear()
    train(tmp_path / "resumed", *QUIET, checkpoint=tmp_path / "old.ckpt")
    assert not [record for record in caplog.records if "differs from the one it resumes" in record.getMessage()]
    assert_equal_ends(folder, tmp_path / "resumed")


def test_config_with_removed_keys_is_read(node):
    arch = node["disc_arch"]["arch"]
    old = {**REMOVED, "disc_arch": {**node["disc_arch"], "arch": {**arch, **REMOVED["disc_arch"]["arch"]}}}
    assert parse(node, **old) == parse(node)
    published = node["lpips_arch"] | {"weights": "pretrained", "channels": [64, 128, 256, 512, 512]}
    assert parse(node, lpips_arch=published).lpips_arch.weights == "pretrained"
