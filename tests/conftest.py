"""Shared fixtures: the smallest models of every part, with seeded random weights."""

import json
import os
import shlex
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: a test never asks a hub

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import omegaconf.base
import pytest
import torch

from src.core.stopping import STOP
from src.models.rae import RAE

omegaconf.base.parse = cache(omegaconf.base.parse)  # of `${...}`: most of the time that resolving a configuration takes
# Started by nohup or in the background, tests ignore these signals, and so would the runs that they start and signal.
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
    """A tiny RAE; `encoder_params` in `changes` are added to the untrained ones."""
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
    """An export of stage 1: latents of 64 x 4 x 4 at 64 px, with statistics of the dummy's like."""
    from tests.tiny_models import exported, tiny_rae

    folder = tmp_path_factory.mktemp("autoencoder")
    rae = tiny_rae(folder)
    latents = rae.encode_raw(torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    rae.set_statistics(latents.mean(0), latents.var(0))
    return exported(rae, folder / "export")


@pytest.fixture(scope="session")
def stage1_run(tmp_path_factory: pytest.TempPathFactory):
    """Six updates of stage 1 in two epochs, without interruption: the folder and the run's parts."""
    from tests.training import QUIET, train

    folder = tmp_path_factory.mktemp("stage1")
    return folder, train(folder, *QUIET)


@pytest.fixture(scope="session")
def stage2_run(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Six updates of stage 2 in two epochs, without interruption: the folder and the run's parts."""
    from tests.training import train_stage2

    folder = tmp_path_factory.mktemp("stage2")
    return folder, train_stage2(folder, autoencoder)


@pytest.fixture
def run_program(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run the `main` of a program that scores; return what it printed and the content of its JSON file, or (code 1) its message."""

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
def no_request_to_stop_is_left():
    """A test that asks the process to stop does not ask the next one."""
    yield
    STOP.reset()
