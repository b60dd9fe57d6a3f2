"""Every shipped config composes, and the guide's training commands set the values the guide promises."""

import re
import shlex

import pytest
from omegaconf import OmegaConf

from src.core.text import flat
from src.core.weights import PROJECT_ROOT
from src.training.settings import ModelSettings
from src.training.stage2 import Stage2Settings
from tests.training import composed

EXPERIMENTS = sorted(path.stem for path in (PROJECT_ROOT / "configs/experiment").glob("*.yaml"))

# Commands of the guide and values they imply; tests/test_docs.py composes every one.
GUIDE = {
    "experiment=rae_dummy trainer=gpu": {"trainer.accelerator": "gpu", "trainer.devices": 1},
    "experiment=rae_siglip_dummy": {"data.image_size": 378, "trainer.limit_train_batches": 0.1, "data.batch_size": 8},
    "experiment=rae_siglip_dummy trainer=gpu": {"trainer.accelerator": "gpu"},
    "experiment=rae_dino": {"data.batch_size": 128, "data.image_size": 256, "trainer.max_epochs": 16, "trainer.precision": 16, "data.num_workers": 8},
    "experiment=rae_siglip": {"data.image_size": 378, "model.encoder_cls": "SigLIP2wNorm", "model.decoder_patch_size": 14},
    "experiment=rae_ddp": {"trainer.strategy": "ddp", "data.batch_size": 64},
    "experiment=rae_siglip data.batch_size=64": {"trainer.strategy": "auto"},
    "experiment=rae_dino data.image_size=256": {"model.image_size": 256},
    "experiment=rae_dino model.optimizer.lr=1e-4": {"model.optimizer.lr": 1e-4, "model.scheduler.base_lr": 1e-4},
    "experiment=rae_dino trainer.max_epochs=100": {"trainer.max_epochs": 100, "model.scheduler.decay_end_epoch": 100},
    "experiment=rae_dino data.image_size=128": {"model.image_size": 128},
    "experiment=rae_dino trainer.accumulate_grad_batches=4": {"model.accumulate_grad_batches": 4, "data.accumulate": 4},
    "experiment=rae_siglip data.image_size=256 model.decoder_patch_size=16 model.encoder_params.num_tokens=256": {"model.encoder_params.num_tokens": 256},
}  # fmt: skip

# Defaults that the guide prints from configs/model/rae.yaml and configs/callbacks/rae.yaml.
PRINTED_DEFAULTS = {
    "model.encoder_cls": "Dinov2withNorm", "model.encoder_config_path": "facebook/dinov2-with-registers-base",
    "model.encoder_params.normalize": True, "model.decoder_config_path": "configs/decoder/ViTXL/config.json",
    "model.decoder_patch_size": 16, "model.pretrained_decoder_path": None, "model.optimizer.lr": 0.0002,
    "model.optimizer.betas": [0.9, 0.95], "model.optimizer.weight_decay": 0.0, "model.scheduler.type": "cosine",
    "model.scheduler.warmup_epochs": 1, "model.scheduler.decay_end_epoch": 16, "model.scheduler.base_lr": 0.0002,
    "model.scheduler.final_lr": 2e-05, "model.scheduler.warmup_from_zero": True, "model.ema_decay": 0.9978,
    "model.disc_weight": 0.75, "model.perceptual_weight": 1.0, "model.disc_start_epoch": 8, "model.disc_upd_start_epoch": 6,
    "model.lpips_start_epoch": 0, "model.sample_every": 2500, "model.disc_arch.arch.ks": 9,
    "model.disc_arch.arch.norm_type": "bn", "model.disc_arch.arch.using_spec_norm": True, "model.disc_arch.arch.recipe": "S_8",
    "model.disc_arch.augment.prob": 1.0, "model.disc_arch.augment.cutout": 0.0, "model.disc_optimizer.lr": 0.0002,
    "callbacks.rfid.rfid_every_n_steps": 1000, "callbacks.rfid.rfid_every_epoch": True, "callbacks.rfid.rfid_num_samples": 1000,
    "callbacks.rfid.rfid_batch_size": 64, "callbacks.rfid.rfid_device": "cuda",
    "callbacks.rfid.rfid_output_dir": "logs/rfid_samples", "callbacks.rfid.rfid_save_samples": True,
    "callbacks.rfid.save_samples_count": 64, "callbacks.rfid.use_train_dataloader": True,
}  # fmt: skip


def plain(config):
    config.paths.run_dir = "somewhere"
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_its_model_settings_parse(experiment):
    config = plain(composed([f"experiment={experiment}"]))
    assert config["experiment_name"] == experiment
    settings = {key: value for key, value in config["model"].items() if key != "_target_"}
    (Stage2Settings if "autoencoder" in settings else ModelSettings).parse(settings, "model")
    assert settings["image_size"] == config["data"]["image_size"]
    assert ("rfid" in config["callbacks"]) == ("autoencoder" not in settings)


@pytest.mark.parametrize("line", GUIDE)
def test_guide_commands(line):
    config = composed(shlex.split(line))
    plain(config)
    for key, value in GUIDE[line].items():
        assert OmegaConf.select(config, key, throw_on_missing=True) == value, key


def test_defaults_are_those_printed_in_the_guide():
    config = composed(["experiment=rae_dino"])
    for key, value in PRINTED_DEFAULTS.items():
        assert OmegaConf.select(config, key) == value, key
    for name in ("default", "rae", "no_checkpoint"):
        assert "rfid" in composed([f"callbacks={name}"]).callbacks
    assert "checkpoint" not in composed(["callbacks=no_checkpoint"]).callbacks


def test_encoder_config_path_sets_the_encoder_source():
    config = composed(["experiment=rae_dino", "model.encoder_config_path=facebook/dinov2-with-registers-large"])
    assert config.model.encoder_params.dinov2_path == "facebook/dinov2-with-registers-large"


def test_dummy_experiments_set_no_model_keys():
    """So that `model=rae` runs the real networks on the same data."""
    for name in (n for n in EXPERIMENTS if n.endswith("dummy")):
        text = (PROJECT_ROOT / f"configs/experiment/{name}.yaml").read_text()
        assert not re.search(r"^model:", text, re.MULTILINE), name
    real = composed(["experiment=rae_dummy", "model=rae"]).model.encoder_params.dinov2_path
    assert real == "facebook/dinov2-with-registers-base"
    siglip = composed(["experiment=rae_siglip_dummy", "model=rae_siglip"]).model.encoder_params
    assert siglip.model_name.startswith("google/")


MY_DATASET = """# configs/data/my_dataset.yaml
data_dir: /path/to/dataset_train_only
use_hf_dataset: true
hf_split: train
hf_validation_split: validation
train_split: 0.8
"""


def test_data_config_of_the_guide(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my_dataset.yaml").write_text(MY_DATASET)
    config = composed([f"hydra.searchpath=[file://{tmp_path}]", "data=my_dataset", "data.num_workers=3"])
    assert config.data.train_split == 0.8 and config.data.data_dir == "/path/to/dataset_train_only"
    assert config.data.num_workers == 3 and config.data._target_ == "src.data.datamodule.RAEDataModule"
    with_experiment = composed([f"hydra.searchpath=[file://{tmp_path}]", "experiment=rae_dino", "data=my_dataset"])
    assert with_experiment.data.batch_size == 128 and with_experiment.data.train_split == 0.8


def test_published_experiment_differs_only_in_the_keys_it_names():
    ours, theirs = (flat(plain(composed([f"experiment={name}"]))) for name in ("rae_ddp", "rae_dino_published"))
    assert {key: value for key, value in theirs.items() if ours[key] != value} == {
        "experiment_name": "rae_dino_published", "model.train_positions": True, "model.adaptive_weight": "per_rank",
        "data.exif": "ignore", "callbacks.rfid.quantization": "truncate", "trainer.precision": 32,
    }  # fmt: skip
