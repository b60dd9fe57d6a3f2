"""`src/make_reference.py`, and scores against what it wrote."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src import eval_rfid, make_reference
from src.evaluation import rfid
from src.evaluation.images import open_images
from src.metrics.fid import load_npz
from src.metrics.reference import Preparation
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
    assert f"arr_0 (all of {images}, 64 px, EXIF apply) of 9 images" in capsys.readouterr().out
    for name in ("stats.npz", "images.npz"):
        assert score(checkpoint, images, tmp_path, "--reference", tmp_path / name) == pytest.approx(own, rel=1e-4)
    statistics = load_npz(tmp_path / "stats.npz")
    assert statistics.count == 9 and statistics.features == "inception-untrained-seed0-width0.03"
    assert np.load(tmp_path / "images.npz")["arr_0"].shape == (9, 64, 64, 3)
    fingerprint = open_images(images, None, None).source.fingerprint()
    for name in ("stats.npz", "images.npz"):
        assert Preparation.of_file(tmp_path / name) == Preparation(64, "apply", "all", fingerprint, 9, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "images.npz", "stats.npz"]


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


def type_what_it_says(message: str, folder: Path) -> Path:
    """Run the command that a message names, on the tiny network and into `folder`; the file that it makes."""
    (command,) = re.findall(r"`python src/make_reference\.py ([^`]+)`", message)
    arguments = shlex.split(command)
    place = arguments.index("--output") + 1
    arguments[place] = str(folder / arguments[place])
    assert make_reference.main([*arguments, "--num_workers", "0", "--batch_size", "4"]) == 0
    return Path(arguments[place])


@pytest.mark.parametrize("kind", ["statistics", "images"])
def test_another_image_size_is_refused_and_the_command_that_is_named_mends_it(
    images, checkpoint, tmp_path, capsys, caplog, kind
):
    make(images, tmp_path / "a.npz", "--kind", kind, "--image_size", 48)
    arguments = ["--checkpoint", checkpoint, "--data_dir", images, *QUICK, "--reference", tmp_path / "a.npz"]
    capsys.readouterr()
    assert eval_rfid.main([str(a) for a in arguments]) == 1
    captured = capsys.readouterr()
    assert "48 x 48 px" in captured.err and "64 x 64 px" in captured.err and captured.out == ""
    mended = type_what_it_says(captured.err, tmp_path)
    caplog.clear()
    own = score(checkpoint, images, tmp_path)
    assert score(checkpoint, images, tmp_path, "--reference", mended) == pytest.approx(own, rel=1e-4)
    assert "prepared otherwise" not in caplog.text and "does not say" not in caplog.text


def test_all_references_are_looked_at_before_the_first_pass(images, checkpoint, tmp_path, monkeypatch):
    make(images, tmp_path / "good.npz")
    make(images, tmp_path / "bad.npz", "--image_size", 48)
    monkeypatch.setattr(rfid, "score_images", lambda *_: pytest.fail("a pass was begun"))
    arguments = ["--checkpoint", checkpoint, "--data_dir", images, images, *QUICK]
    arguments += ["--reference", tmp_path / "good.npz", tmp_path / "bad.npz"]
    assert eval_rfid.main([str(a) for a in arguments]) == 1


def test_a_reference_of_all_images_is_warned_of_where_held_out_ones_are_scored(images, tmp_path, caplog):
    """A set without a validation split: only the checkpoint knows which images are to be scored."""
    held_out = write_checkpoint(tmp_path / "best.ckpt", images, train_split=0.5)
    make(images, tmp_path / "all.npz")
    assert "Give the same --checkpoint FILE" in caplog.text
    caplog.clear()
    own = score(held_out, images, tmp_path)
    assert "prepared otherwise" not in caplog.text
    other = score(held_out, images, tmp_path, "--reference", tmp_path / "all.npz")
    (warning,) = [r.getMessage() for r in caplog.records if "prepared otherwise" in r.getMessage()]
    assert "the split 'all', here 'held_out'" in warning and f"--checkpoint {held_out}" in warning
    assert abs(own - other) > 1e-3 * own
    caplog.clear()
    mended = type_what_it_says(warning, tmp_path)
    assert "has no validation split: the reference is made of all" not in caplog.text
    assert Preparation.of_file(mended).split == "held_out"
    assert score(held_out, images, tmp_path, "--reference", mended) == pytest.approx(own, rel=1e-4)
    assert "prepared otherwise" not in caplog.text


def test_a_checkpoint_says_size_and_exif_of_its_reference(images, tmp_path):
    trained = write_checkpoint(tmp_path / "best.ckpt", images, data={"exif": "ignore"})
    make_reference.main(
        [str(a) for a in ["--checkpoint", trained, "--data_dir", images, "--output", tmp_path / "a.npz", *QUICK]]
    )
    made = Preparation.of_file(tmp_path / "a.npz")
    assert (made.image_size, made.exif) == (64, "ignore")


def test_another_exif_and_another_number_are_warned_of(images, checkpoint, tmp_path, caplog):
    make(images, tmp_path / "a.npz", "--exif", "ignore", "--num_samples", 8)
    score(checkpoint, images, tmp_path, "--reference", tmp_path / "a.npz", "--num_samples", 7)
    (warning,) = [r.getMessage() for r in caplog.records if "prepared otherwise" in r.getMessage()]
    assert "EXIF orientation ignore, here apply (--exif)" in warning and "8 images, here 7 (--num_samples)" in warning
    assert "--num_samples 7" in warning and "--exif apply" in warning


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "held_out"], "only a checkpoint says"),
        (["--checkpoint", "CHECKPOINT", "--image_size", "48"], "works at 64 px"),
        (["--checkpoint", "CHECKPOINT", "--split", "held_out"], "held nothing out"),
        (["--checkpoint", "none.ckpt"], "Checkpoint not found"),
        (["--checkpoint", "STATISTICS"], "no checkpoint of this trainer"),
    ],
)
def test_contradictions(images, checkpoint, tmp_path, capsys, arguments, words):
    torch.save({"mean": torch.zeros(1)}, tmp_path / "statistics.pt")
    places = {"CHECKPOINT": str(checkpoint), "STATISTICS": str(tmp_path / "statistics.pt")}
    arguments = [places.get(a, a) for a in arguments]
    given = ["--data_dir", str(images), "--output", str(tmp_path / "a.npz"), *QUICK, *arguments]
    assert make_reference.main(given) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "a.npz").exists()
