"""Apply the worked examples of CONTRIBUTING.md to a copy of the project and run the checks they list."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from src.core.weights import PROJECT_ROOT

PAGE = (PROJECT_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def hunks(diff: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the target file of a diff and its (old text, new text) pairs."""
    head, *parts = re.split(r"^@@\n", diff, flags=re.MULTILINE)
    target = head.split("+++ ")[1].strip()
    pairs = []
    for part in parts:
        lines = part.splitlines()
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        pairs.append((old, new))
    return target, pairs


def test_worked_examples_pass_their_checks(tmp_path):
    """All in one process: importing transformers takes longer than the checks."""
    for folder in ("src", "configs"):
        shutil.copytree(PROJECT_ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for diff in blocks("diff"):
        target, pairs = hunks(diff)
        text = (tmp_path / target).read_text(encoding="utf-8")
        for old, new in pairs:
            assert text.count(old) == 1, f"{target} contains {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        (tmp_path / target).write_text(text, encoding="utf-8")
    checks = []
    for block in blocks("python"):
        checks.append(str(tmp_path / block.split("\n", 1)[0].removeprefix("# ").strip()))
        Path(checks[-1]).write_text(block, encoding="utf-8")
    for block in blocks("yaml"):
        (tmp_path / block.splitlines()[1].removeprefix("# ")).write_text(block, encoding="utf-8")
    (tmp_path / "tests/test_compose.py").write_text(COMPOSE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *checks, "tests/test_compose.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b6 passed", done.stdout), done.stdout


# Further checks: a run's settings accept the new names, and parts from another package train and export.
COMPOSE = """
import subprocess
import sys

import torch
from hydra import compose, initialize_config_dir

from src.formats.checkpoint import load_trained
from src.formats.folder import read_folder, write_folder
from src.models.encoders import encoder_class
from src.training.settings import ModelSettings
from src.core.weights import PROJECT_ROOT


def test_the_configuration_reaches_the_new_parts():
    names = ["model.encoder=deit-b", "model.disc_loss=least_squares", "model.gen_loss=least_squares", "model.mse_weight=0.5"]
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=["model=rae_encoder", *names])
    from omegaconf import OmegaConf

    model = OmegaConf.to_container(config.model, resolve=True)
    model.pop("_target_")
    settings = ModelSettings.parse(model)
    assert encoder_class(settings.encoder_cls).__name__ == "DeiTwNorm"
    assert settings.disc_loss == settings.gen_loss == "least_squares" and settings.mse_weight == 0.5


def test_parts_of_another_package_train_and_are_exported(tmp_path):
    file = PROJECT_ROOT / "weights/patches.pt"
    file.parent.mkdir()
    torch.save(torch.nn.Conv2d(3, 32, 8, 8).state_dict(), file)
    options = ["data.image_size=64", "data.num_workers=0", "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2",
        "trainer.check_val_every_n_epoch=1", "trainer.num_sanity_val_steps=0"]
    words = ["experiment=mine", "logger=csv", "callbacks=no_checkpoint", "~callbacks.samples", "+callbacks.best._target_=pytorch_lightning.callbacks.ModelCheckpoint"]
    command = [sys.executable, "src/train.py", *options, *words, f"hydra.run.dir={tmp_path}/run"]
    subprocess.run(command, cwd=PROJECT_ROOT, check=True)
    assert "val/charbonnier" in (tmp_path / "run/metrics.csv").read_text()
    loaded = load_trained(next((tmp_path / "run").rglob("*.ckpt")))
    (tmp_path / "export").mkdir()
    write_folder(loaded, tmp_path / "export")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(read_folder(tmp_path / "export").rae(images), loaded.rae(images))
"""
