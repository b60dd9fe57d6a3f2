"""Run training inside a test: compose the config as on the command line, then build and fit in this process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from src.core import metrics_file
from src.core.distributed import Launch
from src.core.weights import PROJECT_ROOT, read
from src.training.record import RunRecord
from src.training.run import Run, build_run, check_config, fit

# The smallest run that exercises every part: 3 updates per epoch, discriminator and GAN from the second update on.
SMALL = [
    "experiment=rae_dummy", "data.image_size=64", "data.batch_size=4", "data.num_workers=0", "trainer.max_epochs=2",
    "trainer.accelerator=cpu", "trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1",
    "model.disc_upd_start_epoch=0.34", "model.disc_start_epoch=0.34", "model.sample_every=0", "trainer.num_sanity_val_steps=0", "trainer.check_val_every_n_epoch=1",
]  # fmt: skip

QUIET = ["~callbacks.rfid", "logger=csv"]

# The same for stage 2: 3 updates per epoch of a network of two blocks.
SMALL_STAGE2 = [
    "experiment=dit_dummy", "data.batch_size=8", "data.num_workers=0", "trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1", "trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1", "model.sample_every=0", "callbacks.checkpoint.every_n_steps=1",
    "~callbacks.samples", "logger=csv", "model.network.hidden_size=[32,48]", "model.network.depth=[1,1]", "model.network.num_heads=[2,2]",
    "model.sampler.num_steps=4",
]  # fmt: skip


def composed(overrides: list[str]) -> DictConfig:
    """Return the config of `python src/train.py OVERRIDES…`."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
    from omegaconf import open_dict

    with open_dict(config):
        del config["hydra"]
    return config


def train(folder: Path, *overrides: str, checkpoint: Path | None = None, small: bool = True) -> Run:
    """Train in `folder`; return the Run for inspection."""
    folder.mkdir(parents=True, exist_ok=True)
    config = composed([*(SMALL if small else []), *overrides, f"paths.run_dir={folder}"])
    check_config(config)
    run = build_run(config, Launch(0, 1, "single"), checkpoint)
    fit(run, checkpoint, RunRecord(folder, config.experiment_name))
    return run


def train_stage2(folder: Path, autoencoder: Path, *overrides: str, checkpoint: Path | None = None) -> Run:
    autoencoder_of = f"model.autoencoder={autoencoder}"
    return train(folder, *SMALL_STAGE2, autoencoder_of, *overrides, small=False, checkpoint=checkpoint)


def python(*words: object, code: int = 0, threads: str = "1", **environment: str) -> str:
    """Run `python WORDS` in the project root and return its stderr. An expected failure must not be a traceback."""
    own = {name: value for name, value in {**os.environ, "OMP_NUM_THREADS": threads, **environment}.items() if value}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=own, capture_output=True, text=True, timeout=400)
    assert done.returncode == code and (not code or "Traceback" not in done.stderr), done.stdout + done.stderr
    return done.stderr


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def logged(folder: Path, name: str) -> dict[int, float]:
    """Read a metric from metrics.csv as step -> value."""
    return {step: value for step, found, value, _ in metrics_file.read(folder / "metrics.csv") if found == name}


def assert_equal_ends(expected: Path, actual: Path) -> None:
    """Check that the last checkpoints of two run folders are bit-identical."""
    a, b = read(last(expected)), read(last(actual))
    for part in ("state_dict", "optimizer_states", "global_step", "loops"):
        assert same(a[part], b[part]), part


def same(a: Any, b: Any) -> bool:
    """Compare bit for bit, through nested dicts, lists and tuples."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
