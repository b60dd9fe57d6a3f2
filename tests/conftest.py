"""Shared fixtures: tiny models with seeded random weights, and a finished run of each stage."""

import json
import os
import shlex
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set before transformers is imported: tests never contact a hub

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import omegaconf.base
import pytest
import torch

from src.core.stopping import STOP
from src.models.rae import RAE

omegaconf.base.parse = cache(omegaconf.base.parse)  # parsing `${...}` dominates the time to resolve a config
# Under nohup or in the background these signals are ignored, also by the runs that tests start and signal: restore them.
for _name, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _handler)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

TINY_ENCODERS = {
    "Dinov2withNorm": {"dinov2_path": "configs/encoder/dinov2_tiny"},
    "SigLIP2wNorm": {"model_name": "configs/encoder/siglip_tiny"},
    "MAEwNorm": {"model_name": "configs/encoder/mae_tiny"},
    "DINOv3wNorm": {"model_name": "configs/encoder/dinov3_tiny"},
}


def make_rae(encoder_cls: str = "Dinov2withNorm", image_size: int = 64, **changes: Any) -> RAE:
    """Build a tiny RAE; `encoder_params` in `changes` are merged into the defaults, which are untrained."""
    params = {**TINY_ENCODERS[encoder_cls], "weights": "untrained", **changes.pop("encoder_params", {})}
    source = next(iter(TINY_ENCODERS[encoder_cls].values()))
    arguments = {
        "encoder_cls": encoder_cls,
        "encoder_config_path": source,
        "encoder_params": params,
        "decoder_config_path": "configs/decoder/tiny",
        "decoder_patch_size": 16,
        "image_size": image_size,
    }
    torch.manual_seed(0)
    return RAE(**{**arguments, **changes})


@pytest.fixture
def rae() -> RAE:
    return make_rae()


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a stage-1 export: latents of 64 x 4 x 4 at 64 px, with statistics of random images."""
    from tests.tiny_models import exported, tiny_rae

    folder = tmp_path_factory.mktemp("autoencoder")
    rae = tiny_rae(folder)
    latents = rae.encode_raw(torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    rae.set_statistics(latents.mean(0), latents.var(0))
    return exported(rae, folder / "export")


@pytest.fixture(scope="session")
def stage1_run(tmp_path_factory: pytest.TempPathFactory):
    """Train stage 1 for six updates in two epochs, uninterrupted; return the run folder and the Run."""
    from tests.training import QUIET, train

    folder = tmp_path_factory.mktemp("stage1")
    return folder, train(folder, *QUIET)


@pytest.fixture(scope="session")
def stage2_run(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Train stage 2 for six updates in two epochs, uninterrupted; return the run folder and the Run."""
    from tests.training import train_stage2

    folder = tmp_path_factory.mktemp("stage2")
    return folder, train_stage2(folder, autoencoder)


@pytest.fixture
def run_program(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run `main` of a scoring script; return its stdout and the content of its JSON file, or (code 1) its error message."""

    def run(main: Callable[[list[str]], int], line: str, code: int = 0) -> Any:
        file = tmp_path / "scores.json"
        assert main([*shlex.split(line), *([] if code else ["--json", str(file)])]) == code
        said = capsys.readouterr()
        if code == 0:
            return said.out, json.loads(file.read_text())
        assert said.out == "" and "Traceback" not in said.err
        return said.err

    return run


@pytest.fixture(autouse=True)
def reset_stop_request():
    """Clear a stop request after each test."""
    yield
    STOP.reset()
