"""`src/make_reference.py`, and scores against its references."""

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


@pytest.fixture
def score(images, checkpoint, tmp_path):
    """Return a function that scores the checkpoint (or another one) with more arguments."""

    def run(more: str = "", model: Path = checkpoint) -> float:
        line = f"--checkpoint {model} --data_dir {images} --json {tmp_path}/a.json {QUICK} {more}"
        assert eval_rfid.main(shlex.split(line)) == 0
        return json.loads((tmp_path / "a.json").read_text())["results"][0]["rfid_untrained"]

    return run


def make(images: Path, output: Path, more: str = "", status: int = 0) -> Path:
    line = f"--data_dir {images} --output {output} --image-size 64 {QUICK} {more}"
    assert make_reference.main(shlex.split(line)) == status
    return output


def refusal(capsys, line: str) -> str:
    assert eval_rfid.main(shlex.split(f"{QUICK} {line}")) == 1
    return capsys.readouterr().err


def told(caplog) -> list[str]:
    """Return and clear the warnings about differently prepared references."""
    found = [record.getMessage() for record in caplog.records if "prepared differently" in record.getMessage()]
    caplog.clear()
    return found


def test_both_kinds_give_the_score_of_the_originals(images, score, tmp_path, capsys):
    own = score()
    statistics = make(images, tmp_path / "stats.npz")
    assert "mu and sigma" in capsys.readouterr().out
    packed = make(images, tmp_path / "images.npz", "--kind images")
    assert f"arr_0 (all of {images}, 64 px, EXIF apply) of 9 images" in capsys.readouterr().out
    fingerprint = open_images(images, None, None).source.fingerprint()
    for file in (statistics, packed):
        assert score(f"--reference {file}") == pytest.approx(own, rel=1e-4)
        assert Preparation.of_file(file) == Preparation(64, "apply", "all", fingerprint, 9, 9)
    assert load_npz(statistics).count == 9
    assert load_npz(statistics).features == "inception-untrained-seed0-width0.125"
    assert np.load(packed)["arr_0"].shape == (9, 64, 64, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "images.npz", "stats.npz"]


def test_packed_reconstructions_are_at_distance_zero_and_other_images_are_not(images, score, tmp_path):
    own = score(f"--save_npz {tmp_path}/packed.npz")
    assert score(f"--reference {tmp_path}/packed.npz") < 1e-6
    other = make(write_images(tmp_path / "other", 9, seed=5), tmp_path / "other.npz")
    assert abs(own - score(f"--reference {other}")) > 1e-3 * own


def test_bad_input(images, checkpoint, tmp_path, capsys):
    make(images, tmp_path / "stats.txt", status=1)
    assert ".npz" in capsys.readouterr().err
    make(images, tmp_path / "a.npz", f"--inception_weights pretrained --inception_path {tmp_path}/no.pth", status=1)
    assert "download_weights.py" in capsys.readouterr().err
    Image.new("RGB", (70, 70)).save(tmp_path / "one.png")
    make(tmp_path, tmp_path / "a.npz", status=1)
    assert "at least 2 images" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz"))
    other = tmp_path / "network.npz"
    np.savez(other, mu=np.zeros(8), sigma=np.eye(8))
    words = f"--checkpoint {checkpoint} --data_dir {images} --reference {other}"
    assert "8 features" in refusal(capsys, words)


def run_suggested_command(message: str, folder: Path) -> Path:
    """Run the command that a message suggests, with its output in `folder`; return the file it writes."""
    (command,) = re.findall(r"`python src/make_reference\.py ([^`]+)`", message)
    arguments = shlex.split(command)
    place = arguments.index("--output") + 1
    arguments[place] = str(folder / arguments[place])
    assert make_reference.main([*arguments, "--num_workers", "0", "--batch_size", "4"]) == 0
    return Path(arguments[place])


def test_wrong_image_size_is_rejected_with_a_command_that_fixes_it(images, checkpoint, score, tmp_path, capsys, caplog):
    other = make(images, tmp_path / "a.npz", "--image_size 48")
    message = refusal(capsys, f"--checkpoint {checkpoint} --data_dir {images} --reference {other}")
    assert "48 x 48 px" in message and "64 x 64 px" in message
    mended = run_suggested_command(message, tmp_path)
    assert score(f"--reference {mended}") == pytest.approx(score(), rel=1e-4)
    assert not told(caplog) and "does not state" not in caplog.text


def test_all_references_are_checked_before_the_first_pass(images, checkpoint, tmp_path, monkeypatch, capsys):
    files = [make(images, tmp_path / "good.npz"), make(images, tmp_path / "bad.npz", "--image_size 48")]
    monkeypatch.setattr(rfid, "score_images", lambda *_: pytest.fail("a pass was begun"))
    refusal(capsys, f"--checkpoint {checkpoint} --data_dir {images} {images} --reference {files[0]} {files[1]}")


def test_scoring_held_out_images_against_all_images_warns(images, score, tmp_path, caplog):
    """Without a validation split, only the checkpoint knows which images are to be scored."""
    held_out = write_checkpoint(tmp_path / "best.ckpt", images, train_split=0.5)
    everything = make(images, tmp_path / "all.npz")
    assert "Give the same --checkpoint FILE" in caplog.text
    own = score(model=held_out)
    assert not told(caplog)
    assert abs(own - score(f"--reference {everything}", held_out)) > 1e-3 * own
    (warning,) = told(caplog)
    assert "the split 'all', here 'held_out'" in warning and f"--checkpoint {held_out}" in warning
    mended = run_suggested_command(warning, tmp_path)
    assert "has no validation split: the reference is made of all" not in caplog.text
    assert Preparation.of_file(mended).split == "held_out"
    assert score(f"--reference {mended}", held_out) == pytest.approx(own, rel=1e-4) and not told(caplog)


def test_reference_takes_size_and_exif_from_a_checkpoint(images, tmp_path):
    trained = write_checkpoint(tmp_path / "best.ckpt", images, data={"exif": "ignore"})
    line = f"--checkpoint {trained} --data_dir {images} --output {tmp_path}/a.npz {QUICK}"
    assert make_reference.main(shlex.split(line)) == 0
    made = Preparation.of_file(tmp_path / "a.npz")
    assert (made.image_size, made.exif) == (64, "ignore")


def test_another_exif_or_number_of_images_warns(images, score, tmp_path, caplog):
    other = make(images, tmp_path / "a.npz", "--exif ignore --num_samples 8")
    score(f"--reference {other} --num_samples 7")
    (warning,) = told(caplog)
    assert "EXIF orientation ignore, here apply (--exif)" in warning and "8 images, here 7 (--num_samples)" in warning
    assert "--num_samples 7" in warning and "--exif apply" in warning


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--split held_out", "only a checkpoint says"),
        ("--checkpoint CHECKPOINT --image_size 48", "works at 64 px"),
        ("--checkpoint CHECKPOINT --split held_out", "held nothing out"),
        ("--checkpoint none.ckpt", "Checkpoint not found"),
        ("--checkpoint STATISTICS", "not a checkpoint of this trainer"),
    ],
)
def test_contradictions(images, checkpoint, tmp_path, capsys, arguments, words):
    torch.save({"mean": torch.zeros(1)}, tmp_path / "statistics.pt")
    line = arguments.replace("CHECKPOINT", str(checkpoint)).replace("STATISTICS", f"{tmp_path}/statistics.pt")
    assert make_reference.main(shlex.split(f"--data_dir {images} --output {tmp_path}/a.npz {QUICK} {line}")) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "a.npz").exists()


def test_one_reference_is_made_of_one_data_set():
    with pytest.raises(SystemExit, match="^2$"):
        make_reference.main(["--data_dir", "a", "b", "--output", "c.npz"])
