"""`src/sample.py`: samples are functions of their index, a killed run goes on, and what is refused."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT
from src.formats.stage2 import open_generator
from src.sample import main as sample
from tests.tiny_models import exported, tiny_rae, two_processes
from tests.training import last


@pytest.fixture
def checkpoint(stage2_run):
    return last(stage2_run[0])


def drawn(checkpoint, output, *options):
    words = ["--checkpoint", checkpoint, "--device", "cpu", "--num_images", 10, "--batch_size", 4, "--output", output]
    assert sample([str(word) for word in (*words, *options)]) == 0
    return np.load(output)


def test_samples_are_balanced_and_functions_of_the_index(checkpoint, tmp_path, capsys):
    one = drawn(
        checkpoint, tmp_path / "one.npz", "--cfg", 1.5, "--latents", tmp_path / "z.npz", "--grid", tmp_path / "g.png"
    )
    assert one["arr_0"].shape == (10, 64, 64, 3) and sorted(np.bincount(one["labels"])) == [3, 3, 4]
    assert (tmp_path / "g.png").is_file() and np.load(tmp_path / "z.npz")["latents"].shape == (10, 64, 4, 4)
    two = drawn(checkpoint, tmp_path / "two.npz", "--cfg", 1.5, "--batch_size", 3, "--latents", tmp_path / "y.npz")
    assert np.abs(np.load(tmp_path / "z.npz")["latents"] - np.load(tmp_path / "y.npz")["latents"]).max() < 1e-4
    assert (one["arr_0"].astype(int) != two["arr_0"]).mean() < 1e-3
    assert not list(tmp_path.glob(".*")) and "UNTRAINED encoder" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_sampling_goes_on_and_two_processes_give_the_same(checkpoint, tmp_path):
    reference = drawn(checkpoint, tmp_path / "whole.npz", "--num_images", 64)
    command = [sys.executable, "src/sample.py", "--checkpoint", str(checkpoint), "--device", "cpu", "--num_images", "64", "--batch_size", "4",
               "--output", str(tmp_path / "cut.npz")]  # fmt: skip
    journal = tmp_path / ".cut.npz.parts" / "done.0"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as here, and under torchrun
    process = subprocess.Popen(
        command, cwd=PROJECT_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut.npz").exists() and journal.read_text().count("\n") < 16
    assert sample([*command[2:], "--batch_size", "2"]) == 1  # another block size is refused
    two_processes(*command[1:])
    cut = np.load(tmp_path / "cut.npz")
    assert np.array_equal(cut["labels"], reference["labels"]) and np.array_equal(cut["arr_0"], reference["arr_0"])


def test_a_sweep_makes_a_file_for_each_point(checkpoint, tmp_path, capsys):
    words = f"--checkpoint {checkpoint} --device cpu --num_images 3 --output {tmp_path}/s.npz --cfg 1 2 --interval 0:1 0.2:0.8"
    assert sample(words.split()) == 0
    names = ["s_cfg1_0.2to0.8.npz", "s_cfg1_0to1.npz", "s_cfg2_0.2to0.8.npz", "s_cfg2_0to1.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "cfg 2 for t in 0.2:0.8" in capsys.readouterr().out


def test_an_autoencoder_or_a_guide_of_other_latents_is_refused(checkpoint, stage2_run, tmp_path):
    digest = stage2_run[1].module.autoencoder_identity["statistics"]["digest"]
    for image_size, message in ((64, f"statistics: {digest} there"), (128, "works at 128 px")):
        other = tiny_rae(tmp_path, image_size=image_size, statistics=True)
        with pytest.raises(UserError, match=message):
            open_generator(checkpoint, autoencoder=str(exported(other, tmp_path / f"{image_size}")))
    with pytest.raises(UserError, match=re.escape("of latents of (64, 4, 4) (C x h x w), but (64, 8, 8) are wanted")):
        open_generator(checkpoint, shape=(64, 8, 8))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--interval", "1:0"], "0 <= T_MIN"), (["--labels", "7"], "classes 0 to 2"), (["--labels", "cat"], "expected equal, random"),
     (["--guide", "no.ckpt", "--auto", "1.5"], "(from --guide)"), (["--autoencoder", "no.ckpt"], "(from --autoencoder)"), (["--autoencoder", "no"], "(from --autoencoder)"), (["--autoencoder", "{a: b: c}"], "Expected a path, or a mapping"),
     (["--internal", "1.5"], "base output"), (["--model", "ditdh_xl"], "says itself"), (["--method", "dopri5"], "torchdiffeq")],
)  # fmt: skip
def test_sampling_mistakes(checkpoint, tmp_path, capsys, words, message):
    command = f"--checkpoint {checkpoint} --device cpu --num_images 2 --output {tmp_path}/s.npz"
    assert sample([*command.split(), *words]) == 1
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "s.npz").exists()
