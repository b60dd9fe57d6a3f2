"""A full disk: one message, no traceback, no partial file, and earlier files stay intact."""

import errno
import json
import os
import resource
import subprocess
from contextlib import contextmanager

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from src.callbacks import samples
from src.core.files import link_or_copy, write_torch
from src.core.weights import read
from src.sample import main as sample
from src.training.run import run
from tests.training import SMALL, composed, last

FAST = [*SMALL, "~callbacks.rfid", "logger=csv", "model.disc_weight=0"]


@contextmanager
def file_limit(size):
    """Limit the files of this process to `size` bytes; larger writes fail with EFBIG, as Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system with room for one and a half checkpoints."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path  # lazily: the log file is still open
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def ends_with_one_message(folder, capfd, *overrides):
    with pytest.raises(SystemExit) as ended:
        run(composed([*FAST, f"paths.run_dir={folder}", *overrides]))
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said and "Logging error" not in said, said
    assert not [path for path in folder.rglob(".*") if path.name.endswith(("writing", "link"))]
    return said


def test_checkpoint_that_does_not_fit_leaves_the_previous_one(small_disk, capfd):
    folder = small_disk / "run"
    said = ends_with_one_message(folder, capfd, "callbacks.checkpoint.every_n_steps=1")
    last = folder / "checkpoints/last.ckpt"
    assert f"The checkpoint {last} can't be written: No space left on device" in said and "ckpt_path=last" in said
    assert said.count("can't be written") == 1, said
    assert read(last)["global_step"] == 1
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "failed" and "can't be written" in record["error"]


@pytest.mark.parametrize("size", [1000, 3000, 20_000, 10**6])
def test_first_file_that_does_not_fit_is_named(tmp_path, capfd, size):
    """The lock, the config, the record, the metrics, the log or the checkpoint."""
    with file_limit(size):
        said = ends_with_one_message(tmp_path / "run", capfd)
    assert "can't be written: File too large" in said, said


@pytest.mark.parametrize(
    ("number", "file"),
    [(errno.ENOSPC, "events.out"), (errno.ESTALE, "events.out"), (errno.ENOENT, b"run/events.out.tfevents.1")],
)
def test_events_that_do_not_fit_or_whose_folder_is_gone(tmp_path, capfd, monkeypatch, number, file):
    def full(self, metrics, step=None):
        raise OSError(number, os.strerror(number), file)

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", full)
    said = ends_with_one_message(tmp_path / "run", capfd, "logger=tensorboard")
    assert f" {os.fsdecode(file)} can't be written: {os.strerror(number)}" in said


def test_sample_image_that_does_not_fit_is_a_warning(tmp_path, monkeypatch, caplog):
    def full(picture, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(samples, "save_png", full)
    run(composed([*FAST, f"paths.run_dir={tmp_path / 'run'}", "trainer.max_steps=1"]))
    assert "The sample image" in (tmp_path / "run/run.log").read_text()
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "finished" and "picture" not in record["result"]


@pytest.mark.parametrize("size", [30_000, 50_000])
def test_sampling_resumes_after_a_full_disk(stage2_run, tmp_path, capsys, size):
    """Either the partial file or the npz does not fit; the images are 49,152 bytes."""
    words = f"--checkpoint {last(stage2_run[0])} --device cpu --num_images 4 --output {tmp_path}/s.npz".split()
    with file_limit(size):
        assert sample(words) == 1
    assert "s.npz: File too large. Free some space and run the same command again" in capsys.readouterr().err
    assert sample(words) == 0


def test_torch_keeps_the_system_error_and_a_failed_copy_leaves_nothing(tmp_path, monkeypatch):
    import torch

    with file_limit(100_000), pytest.raises(OSError, match="File too large"):
        write_torch(tmp_path / "file.pt", {"a": torch.ones(100_000)})
    (tmp_path / "source").write_bytes(bytes(200_000))
    (tmp_path / "target").write_text("old")

    def no_links(*args):
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", no_links)
    with file_limit(100_000), pytest.raises(OSError, match="File too large"):
        link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
