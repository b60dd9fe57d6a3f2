"""`src/sample.py`: samples are functions of their index, a killed run resumes, and invalid input is rejected."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts import dummy_stage2
from src.callbacks.checkpoint import AtomicCheckpointIO
from src.core.errors import UserError
from src.core.folder_lock import take_lock
from src.core.text import quoted
from src.core.weights import PROJECT_ROOT, read
from src.evaluation import samples
from src.formats.checkpoint import load_trained
from src.formats.stage2 import open_generator
from src.sample import main as sample
from tests.tiny_models import exported, loaded, tiny_rae, two_processes
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


def test_labels_equal_random_null_or_listed():
    def labels(which, count, seed=0):
        return samples.labels_of(which, seed, count, SimpleNamespace(num_classes=3, null_label=3)).tolist()

    assert sorted(np.bincount(labels("equal", 8))) == [2, 3, 3] and labels("equal", 99) != sorted(labels("equal", 99))
    assert labels("equal", 99) != labels("equal", 99, seed=1) and labels("random", 99) != labels("random", 99, seed=1)
    assert labels("random", 40) == labels("random", 99)[:40] and set(labels("random", 40)) == {0, 1, 2}
    assert labels("null", 2) == [3, 3] and labels("2,0", 5) == [2, 0, 2, 0, 2]


@pytest.mark.slow
def test_killed_sampling_resumes_and_two_processes_give_the_same(checkpoint, tmp_path):
    reference = drawn(checkpoint, tmp_path / "whole.npz", "--num_images", 64)
    command = [sys.executable, "src/sample.py", "--checkpoint", str(checkpoint), "--device", "cpu", "--num_images", "64", "--batch_size", "4",
               "--output", str(tmp_path / "cut.npz")]  # fmt: skip
    journal = tmp_path / ".cut.npz.parts" / "done.0"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as in `drawn`
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


@pytest.mark.parametrize("words", ["--output s", "--grid g.jpg", "--latents z.pt", "--guide_model ditdh_s"])
def test_invalid_file_names_and_options_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as error:
        sample(["--checkpoint", "x.ckpt", "--output", "s.npz", *words.split()])
    assert error.value.code == 2 and words.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_sweep_writes_files_for_each_point_and_resumes(checkpoint, tmp_path, capsys):
    words = (
        f"--checkpoint {checkpoint} --device cpu --num_images 3 --output {tmp_path}/s.npz --latents {tmp_path}/z.npz"
    )
    words = f"{words} --grid {tmp_path}/g.png --cfg 1 2 --interval 0:1 0.2:0.8".split()
    assert sample(words) == 0
    points = ["cfg1_0.2to0.8", "cfg1_0to1", "cfg2_0.2to0.8", "cfg2_0to1"]
    names = [f"{kind}_{point}.{end}" for kind, end in (("g", "png"), ("s", "npz"), ("z", "npz")) for point in points]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "cfg 2 for t in 0.2:0.8" in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "s_cfg2_0to1.npz").unlink()
    assert sample(words) == 1 and "z_cfg2_0to1.npz exists. Add --overwrite" in capsys.readouterr().err
    for name in ("z_cfg2_0to1.npz", "g_cfg2_0to1.png"):  # as if killed at this point
        (tmp_path / name).unlink()
    assert sample(words) == 0
    changed = [path.name for path in tmp_path.iterdir() if before[path.name] != path.stat().st_mtime_ns]
    assert sorted(changed) == [f"{kind}_cfg2_0to1.{end}" for kind, end in (("g", "png"), ("s", "npz"), ("z", "npz"))]
    assert sample([*words, "--seed", "1"]) == 1 and "exists. Add --overwrite" in capsys.readouterr().err


def test_partial_samples_are_used_only_if_intact_and_of_the_same_model(checkpoint, tmp_path, monkeypatch, capsys):
    file, parts = tmp_path / "s.npz", tmp_path / ".s.npz.parts"
    reference = drawn(checkpoint, tmp_path / "reference.npz")
    with monkeypatch.context() as patch:
        patch.setattr(samples.Blocks, "remove", lambda work: work._lock.close())
        drawn(checkpoint, file)
    kept = shutil.copytree(parts, tmp_path / "kept")  # as if killed while cleaning up
    assert np.array_equal(drawn(checkpoint, file)["arr_0"], reference["arr_0"]) and not parts.exists()
    words = f"--checkpoint {checkpoint} --device cpu --num_images 10 --batch_size 4 --output {file}".split()
    assert sample(words) == 1 and "s.npz exists. Add --overwrite" in capsys.readouterr().err  # whoever wrote it
    kept.rename(parts)
    damages = {
        "images": lambda: os.truncate(parts / "images", 100),
        "journal": lambda: (parts / "done.0").write_bytes(b"0\n\0\0\0\n4"),  # a crash of the machine
        "settings": lambda: (parts / "settings.json").write_text(""),
    }
    for name, damage in damages.items():
        file.unlink()
        kept = shutil.copytree(parts, tmp_path / "kept")
        damage()
        made = drawn(checkpoint, file)
        assert np.array_equal(made["arr_0"], reference["arr_0"]), name
        kept.rename(parts)
    file.unlink()
    with take_lock(parts):
        assert sample(words) == 1
    assert "still going on" in capsys.readouterr().err
    changed = json.loads((parts / "settings.json").read_text()) | {"statistics": "0" * 16}
    (parts / "settings.json").write_text(json.dumps(changed))
    assert sample(words) == 1
    assert "other settings (statistics: '0000000000000000' there" in capsys.readouterr().err


def test_checkpoints_that_lack_a_part_are_rejected(checkpoint, tmp_path):
    content = read(checkpoint)
    damaged = {
        part: {**content, part: None} for part in ("global_step", "encoder", "statistics", "architecture", "state_dict")
    }
    for key in ("network", "flow", "sampler", "num_classes", "image_size"):
        damaged[f"model.{key}"] = {**content, "config": {"model": {**content["config"]["model"], key: "x"}}}
    for name, values in (damaged | {"config": {**content, "config": 1}}).items():
        torch.save(values, tmp_path / "x.ckpt")
        with pytest.raises(UserError, match=rf"{name}=|is a checkpoint of stage 1"):
            open_generator(tmp_path / "x.ckpt")


def test_processes_that_read_different_states_of_a_checkpoint_stop(checkpoint, stage1_run, monkeypatch):
    """A run that still trains may replace last.ckpt between the reads of two processes."""
    monkeypatch.setattr("src.core.distributed.gather", lambda step: [step, step + 3])
    autoencoder = last(stage1_run[0])
    for read_by, file in (
        (open_generator, checkpoint), (load_trained, autoencoder), (AtomicCheckpointIO().load_checkpoint, autoencoder),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"last.ckpt was replaced while it was read: .* steps 6, 9"):
            read_by(file)


def test_autoencoder_or_guide_of_other_latents_is_rejected(checkpoint, stage2_run, tmp_path):
    digest = stage2_run[1].module.autoencoder_identity["statistics"]["digest"]
    for image_size, message in ((64, f"statistics: {digest} there"), (128, "works at 128 px")):
        other = tiny_rae(tmp_path, image_size=image_size, statistics=True)
        with pytest.raises(UserError, match=message):
            open_generator(checkpoint, autoencoder=str(exported(other, tmp_path / f"{image_size}")))
    with pytest.raises(UserError, match=re.escape("shape (C x h x w): (64, 4, 4) there, (64, 8, 8) here")):
        open_generator(checkpoint, loaded=loaded(other))


def changed(checkpoint, file, rows, digest=None, **model):
    """Write a checkpoint of a model whose label table has `rows` rows."""
    content = read(checkpoint)
    content["config"]["model"] |= model
    content["statistics"] = {"digest": digest} if digest else content["statistics"]
    content["state_dict"] = {name: v[:rows] if "table" in name else v for name, v in content["state_dict"].items()}
    torch.save(content, file)
    return file


def test_requirements_on_a_model_and_its_guide(checkpoint, tmp_path, capsys):
    plain = changed(checkpoint, tmp_path / "plain.ckpt", 3, label_dropout=0)
    fewer = changed(checkpoint, tmp_path / "fewer.ckpt", 3, num_classes=2)
    other = changed(checkpoint, tmp_path / "other.ckpt", 4, "0" * 16)
    moved = changed(checkpoint, tmp_path / "moved.ckpt", 4, statistics="/nowhere/stats.pt")
    newer = tmp_path / "newer.ckpt"
    torch.save(read(checkpoint) | {"format_version": 99}, newer)
    for file, words, message in (
        (plain, "--labels null", "the model has no null label"),
        (plain, "--cfg 2", "needs a null label"),
        (checkpoint, f"--guide {plain} --auto 1.5 --cfg 2", "or its guide, has model.label_dropout=0"),
        (checkpoint, f"--guide {fewer} --auto 1.5", "The guide has 2 classes, the model 3"),
        (checkpoint, f"--guide {other} --auto 1.5", f"statistics: {'0' * 16} there"),
        (newer, "", "with --model (ditdh_xl, dit_xl, raev2_dit_k7, ...) and its autoencoder with --autoencoder"),
        (checkpoint, f"--guide {newer} --auto 1.5", "with --guide_model (ditdh_xl, dit_xl, raev2_dit_k7, ...)."),
        (newer, "--model rae_dino", "is a model of stage 1"),
    ):
        output = tmp_path / "s.npz"
        assert sample(f"--checkpoint {file} --device cpu --num_images 2 --output {output} {words}".split()) == 1
        assert message in " ".join(capsys.readouterr().err.split()), words
    assert drawn(checkpoint, output, "--guide", plain, "--auto", 1.5)["arr_0"].any()
    assert drawn(moved, output, "--overwrite")["arr_0"].any()  # the autoencoder has the same statistics


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--interval", "1:0"], "0 <= T_MIN"), (["--labels", "7"], "classes 0 to 2"), (["--labels", "cat"], "expected equal, random"),
     (["--guide", "no.ckpt", "--auto", "1.5"], "(from --guide)"), (["--autoencoder", "no.ckpt"], "(from --autoencoder)"), (["--autoencoder", "no"], "(from --autoencoder)"), (["--autoencoder", "{a: b: c}"], "Expected a path, or a mapping"),
     (["--internal", "1.5"], "base output"), (["--model", "ditdh_xl"], "contains the configuration"), (["--method", "dopri5"], "torchdiffeq"),
     (["--cfg", "1e38"], "Samples 0 to 1 hold NaN or infinity"), (["--labels", "9" * 30], "classes such as"), (["--cfg", "1.5", "1.50000001"], "would be written twice"), (["--interval", "0:1", "a/b:1"], "a/b:1: expected T_MIN"),
     (["--latents", "{}/z.npz"], "z.npz exists. Add --overwrite"), (["--latents", "{}/s.npz"], "s.npz would be written twice"),
     (["--overwrite", "--grid", "{}/g.png"], "g.png is a folder")],
)  # fmt: skip
def test_invalid_options_are_rejected(checkpoint, tmp_path, capsys, words, message):
    (tmp_path / "z.npz").touch()
    (tmp_path / "g.png").mkdir()
    command = f"--checkpoint {checkpoint} --device cpu --num_images 2 --output {tmp_path}/s.npz"
    assert sample([*command.split(), *(word.replace("{}", str(tmp_path)) for word in words)]) == 1
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "s.npz").exists()


def test_dummy_script_finishes_a_stopped_stage_and_replaces_no_run(tmp_path, monkeypatch):
    calls, tmp_path = [], tmp_path / "it's"
    monkeypatch.setattr(dummy_stage2, "_program", lambda *words: calls.append([str(word) for word in words]))
    monkeypatch.setattr(dummy_stage2, "_judge", lambda *files: (1.0, 1.0, 1.0))
    checkpoint, record = (tmp_path / "autoencoder" / name for name in ("checkpoints/last.ckpt", "run.json"))
    (tmp_path / "run-2").mkdir(parents=True)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    for status in ("interrupted", "finished"):
        record.write_text(json.dumps({"status": status}))
        (tmp_path / "stats.pt").touch()
        calls.clear()
        assert dummy_stage2.main(["--folder", str(tmp_path)]) == 0
        assert "model.flip_probability=0" in calls[-2]  # stored latents can't be mirrored: training would warn
        names = [words[0] for words in calls]
        assert names == ["train.py", "reconstruct.py", "latent_stats.py"] * (status != "finished") + [
            "train.py",
            "sample.py",
        ]
        assert (f"ckpt_path={quoted(checkpoint)}" in calls[0]) == (
            status != "finished"
        ) and f"paths.run_dir={quoted(tmp_path / 'run-1')}" in calls[-2]


STAGE = """
import time
from pathlib import Path
try:
    Path("began").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # subprocess.run would kill it after a quarter of a second
    Path("saved").touch()
    raise SystemExit(130)
"""


def test_ctrl_c_leaves_a_stage_of_the_dummy_script_time_to_save(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/stage.py").write_text(STAGE)
    start = "import pathlib; from scripts import dummy_stage2 as d; d.PROJECT_ROOT = pathlib.Path(%r); d._program('stage.py')"
    process = subprocess.Popen([sys.executable, "-c", start % str(tmp_path)], cwd=PROJECT_ROOT, start_new_session=True)
    while process.poll() is None and not (tmp_path / "began").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130 and (tmp_path / "saved").exists()
