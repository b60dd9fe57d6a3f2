"""One folder for all processes of a launch and one for each job of a sweep, never one that exists."""

import json
import os
import socket
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest

from src.core.errors import UserError
from src.core.launch import Launch
from src.core.weights import PROJECT_ROOT
from src.training import record as module
from src.training.record import make_folder
from tests.training import SMALL

FAST = [*SMALL, "~callbacks.rfid", "logger=csv", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_runs_that_start_in_the_same_second_get_one_each(tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "datetime", type("Fixed", (), {"now": staticmethod(lambda: datetime(2026, 1, 2, 3, 4, 5))})
    )
    base, found = tmp_path / "runs/2026-01-02", []
    threads = [threading.Thread(target=lambda: found.append(make_folder(str(tmp_path), None))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {base / "03-04-05", *(base / f"03-04-05-{number}" for number in range(2, 9))}
    assert all(folder.is_dir() for folder in found)


def test_a_folder_that_was_asked_for_may_exist(tmp_path):
    for _ in range(2):
        assert make_folder("unused", str(tmp_path / "above" / "mine")) == tmp_path / "above" / "mine"


@pytest.mark.parametrize(("log_dir", "wanted"), [("file", None), ("logs", "file"), ("logs", "file/mine")])
def test_a_place_that_cannot_be_written(tmp_path, log_dir, wanted):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"paths\.log_dir"):
        make_folder(str(tmp_path / log_dir), wanted and str(tmp_path / wanted))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 1, "single")),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "none"}, Launch(3, 8, "torchrun")),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, Launch(3, 8, "torchrun")),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, Launch(2, 4, "slurm")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch(0, 1, "single")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, Launch(0, 1, "single")),
        ({"LOCAL_RANK": "1"}, Launch(1, 0, "child")),
        ({"LOCAL_RANK": "1", "NODE_RANK": "2"}, Launch(2, 0, "child")),
    ],
)
def test_who_started_this_process(monkeypatch, environment, expected):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "NODE_RANK",
        "TORCHELASTIC_RUN_ID",
        "SLURM_PROCID",
        "SLURM_NTASKS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Launch.detect() == expected
    assert expected.main == (expected.rank == 0)


LATE = """
import os, sys, time, runpy, torch.distributed as dist
get = dist.TCPStore.get

def late(store, key):
    dist.TCPStore.get = get
    time.sleep(3 * int(os.environ["RANK"]))
    return get(store, key)

dist.TCPStore.get = late
del sys.argv[0]
sys.path.insert(0, "")
runpy.run_path("src/train.py", run_name="__main__")
"""


def test_three_processes_without_torchrun_meet_in_one_folder(tmp_path):
    """As mpirun or Kubernetes start them; nothing that rank 0 offers may be gone before the others have read it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-c", LATE, "src/train.py", *FAST, "data.batch_size=1", f"paths.log_dir={tmp_path}"]
    ranks = [
        subprocess.Popen(
            command, cwd=PROJECT_ROOT, env={**ENVIRONMENT, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=150)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0, 0], said
    (folder,) = tmp_path.glob("runs/*/*")
    assert json.loads((folder / "run.json").read_text())["processes"] == 3


SWEEP = """
import os, sys, threading, torch
sys.path[0] = {root!r}
from src.training import run as module
job = module.run

def state():
    return [dict(os.environ), list(sys.argv), torch.get_num_threads(), torch.distributed.is_initialized()]

def checked(config):
    before = state()
    result = job(config)
    after = state()
    assert before == after, (before, after)
    return result

module.run = checked
program = os.path.join({root!r}, "src", "train.py")
exec(compile(open(program).read(), program, "exec"), {{"__name__": "__main__", "__file__": program}})
"""


def test_a_sweep_of_two_processes_each_leaves_every_job_its_own(tmp_path):
    """Nothing of one job is left in the process of the next: ranks, ports, arguments, thread counts."""
    script = tmp_path / "train.py"
    script.write_text(SWEEP.format(root=str(PROJECT_ROOT)))
    command = [sys.executable, str(script), "-m", *FAST, "trainer=ddp_sim", f"paths.log_dir={tmp_path}"]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*command, "experiment_name=first,second"], cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for number, name in enumerate(["first", "second"]):
        (folder,) = tmp_path.glob(f"multiruns/*/*/{number}")
        record = json.loads((folder / "run.json").read_text())
        assert (record["experiment_name"], record["status"], record["processes"]) == (name, "finished", 2)
        assert f"experiment_name={name}" in record["command"] and "-m" not in record["command"]
        assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert not list(Path(tmp_path).glob("runs"))
