"""`src/make_reference.py`, and scores against what it wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src import eval_rfid, make_reference
from src.metrics.fid import load_npz
from tests.test_eval_rfid import QUICK, write_checkpoint, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "pictures", 9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, images) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.ckpt", images)


def score(checkpoint: Path, images: Path, out: Path, *more: object) -> float:
    arguments = ["--checkpoint", checkpoint, "--data_dir", images, "--json", out / "a.json", *QUICK, *more]
    assert eval_rfid.main([str(a) for a in arguments]) == 0
    return json.loads((out / "a.json").read_text())["results"][0]["rfid_untrained"]


def make(images: Path, output: Path, *more: object, status: int = 0) -> None:
    assert (
        make_reference.main(
            [str(a) for a in ["--data_dir", images, "--output", output, "--image-size", 64, *QUICK, *more]]
        )
        == status
    )


def test_both_kinds_give_the_score_of_the_originals(images, checkpoint, tmp_path, capsys):
    own = score(checkpoint, images, tmp_path)
    make(images, tmp_path / "stats.npz")
    assert "mu and sigma" in capsys.readouterr().out
    make(images, tmp_path / "images.npz", "--kind", "images")
    assert "arr_0, 64 px of 9 images" in capsys.readouterr().out
    for name in ("stats.npz", "images.npz"):
        assert score(checkpoint, images, tmp_path, "--reference", tmp_path / name) == pytest.approx(own, rel=1e-4)
    statistics = load_npz(tmp_path / "stats.npz")
    assert statistics.count == 9 and statistics.features == "inception-untrained-seed0-width0.03"
    assert np.load(tmp_path / "images.npz")["arr_0"].shape == (9, 64, 64, 3)


def test_a_set_against_itself_is_zero_and_packed_reconstructions_are_a_reference(images, checkpoint, tmp_path):
    """Reconstructions packed by one run are the reference of the next: no distance."""
    score(checkpoint, images, tmp_path, "--save_npz", tmp_path / "packed.npz")
    assert score(checkpoint, images, tmp_path, "--reference", tmp_path / "packed.npz") < 1e-6


def test_another_reference_gives_another_score(images, checkpoint, tmp_path):
    other = write_images(tmp_path / "other", 9, seed=5)
    make(other, tmp_path / "other.npz")
    own, foreign = (
        score(checkpoint, images, tmp_path),
        score(checkpoint, images, tmp_path, "--reference", tmp_path / "other.npz"),
    )
    assert abs(own - foreign) > 1e-3 * own


def test_statistics_of_another_network_are_refused(images, checkpoint, tmp_path, capsys):
    make(images, tmp_path / "stats.npz", "--inception_width", "0.05")
    arguments = ["--checkpoint", checkpoint, "--data_dir", images, *QUICK, "--reference", tmp_path / "stats.npz"]
    assert eval_rfid.main([str(a) for a in arguments]) == 1
    assert "features" in capsys.readouterr().err


def test_bad_input(images, tmp_path, capsys):
    make(images, tmp_path / "stats.txt", status=1)
    assert ".npz" in capsys.readouterr().err
    make(
        images,
        tmp_path / "stats.npz",
        "--inception_weights",
        "pretrained",
        "--inception_width",
        "1",
        "--inception_path",
        tmp_path / "no.pth",
        status=1,
    )
    assert "download_weights.py inception" in capsys.readouterr().err
    Image.new("RGB", (70, 70)).save(tmp_path / "one.png")
    make(tmp_path, tmp_path / "stats.npz", status=1)
    assert "at least 2 images" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz"))
