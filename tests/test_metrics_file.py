"""metrics.csv: written by every run, intact after a kill, and read as one curve across restarts and resumed runs."""

import math
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.metrics_csv import MetricsCsv
from src.core import metrics_file
from src.core.weights import PROJECT_ROOT
from src.training.run import run
from tests.test_report import curves, made, make_run, marks
from tests.training import SMALL, composed


def test_metrics_file_continues_after_a_truncated_line(tmp_path):
    file = tmp_path / "metrics.csv"
    metrics_file.append(file, 10, {'a,"b': 0.1, "c": math.inf})
    with file.open("a") as stream:
        stream.write("20,a,0.12")
    expected = [(10, 'a,"b', 0.1), (10, "c", math.inf)]
    assert [row[:3] for row in metrics_file.read(file)] == expected
    metrics_file.append(file, 20, {"new": -1e-9})
    assert [row[:3] for row in metrics_file.read(file)] == [*expected, (20, "new", -1e-9)]


def test_metrics_file_survives_a_kill(tmp_path):
    file = tmp_path / "metrics.csv"
    program = (
        "import pathlib, sys\nfrom src.core.metrics_file import append\nfor i in range(10**9):\n"
        "    append(pathlib.Path(sys.argv[1]), i, {'a': i, 'b': i})\n    print(i, flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(file)], cwd=PROJECT_ROOT, stdout=subprocess.PIPE)
    last = [int(child.stdout.readline()) for _ in range(50)][-1]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    found = [row[:3] for row in metrics_file.read(file)]
    assert len(found) >= 2 * last + 2 and found == [(i // 2, "ab"[i % 2], i // 2) for i in range(len(found))]


def test_full_disk_is_logged_once_and_stops_nothing(tmp_path, caplog):
    logger = MetricsCsv(tmp_path)
    logger.file = tmp_path  # a folder can't be written either
    logger.log_metrics({"a": 1}, 1)
    logger.log_metrics({"a": 1}, 2)
    assert caplog.text.count("can't be written") == 1


def test_restart_in_the_folder_replaces_repeated_steps(tmp_path):
    folder = make_run(tmp_path / "r")
    for step, values in ((20, {"train/loss": 7.0}), (25, {"train/loss": 6.0, "new": 1.0})):
        metrics_file.append(folder / "metrics.csv", step, values)
    found = curves(made(folder))
    assert found["train/loss"] == [(10, 0.9), (20, 7.0), (25, 6.0)] and found["val/loss"] == [(10, 0.8)]
    assert found["new"] == [(25, 1.0)]


def test_curves_of_a_run_and_of_one_that_resumes_it(tmp_path):
    """3 steps per epoch; the second run resumes after the first one's first epoch and logs every second step."""
    first, second = tmp_path / "d/first", tmp_path / "d/second"
    words = [*SMALL, "~callbacks.rfid"]
    run(composed([*words, "logger=csv", f"paths.run_dir={first}"]))
    rest = [f"ckpt_path={first}/checkpoints/epoch_001.ckpt", "trainer.log_every_n_steps=2"]
    run(composed([*words, *rest, f"paths.run_dir={second}"]))
    assert not (first / "csv").exists() and not list(first.glob("events*"))
    text, alone = made(second), curves(made(first))["train/loss"]
    assert [step for step, _ in curves(text)["train/loss"]] == [1, 2, 3, 4, 6]
    assert curves(text)["train/loss"] == [pytest.approx(point) for point in alone if point[0] != 5]
    assert marks(text) == {"discriminator", "GAN term", "resumed"}
    first.rename(tmp_path / "gone")
    assert [step for step, _ in curves(made(second))["train/loss"]] == [4, 6]
    (second / "metrics.csv").unlink()
    assert [step for step, _ in curves(made(second))["train/loss"]] == [4, 6]  # from TensorBoard


def test_events_are_read_if_there_is_no_metrics_file(tmp_path, caplog):
    folder = make_run(tmp_path / "r", {})
    for number_of_file, steps in enumerate(((10, 20, 30), (20, 25))):
        with SummaryWriter(str(tmp_path / "events")) as writer:
            for step in steps:
                writer.add_scalar("train/loss", step + number_of_file, step)
            writer.add_scalar("hp_metric", -1, 0)
            writer.add_image("samples", torch.zeros(3, 8, 8), 30)
        next((tmp_path / "events").iterdir()).rename(folder / f"events.out.tfevents.{number_of_file}")
    assert curves(made(folder)) == {"train/loss": [(10, 10), (20, 21), (25, 26)]}
    assert caplog.text.count("slow") == 2
    whole = (folder / "events.out.tfevents.1").read_bytes()
    (folder / "events.out.tfevents.1").write_bytes(whole[: whole.rfind(b"train/loss")])
    assert curves(made(folder)) == {"train/loss": [(10, 10), (20, 21)]}


def test_tables_of_lightnings_logger_are_read(tmp_path):
    table = make_run(tmp_path / "r", {}) / "csv/metrics.csv"
    table.parent.mkdir()
    table.write_text("epoch,step,train/loss,val/psnr\n0,10,0.5,\n0,20,nan,17.0\n0,,1,1\n0,30,x,18\n0,40")
    assert curves(made(tmp_path / "r")) == {"train/loss": [(10, 0.5), (20, None)], "val/psnr": [(20, 17.0), (30, 18.0)]}
