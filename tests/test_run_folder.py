"""One folder for all processes of a launch, never one that exists."""

import os
import threading
from datetime import datetime
from pathlib import Path

import pytest

from src.core.errors import UserError
from src.core.launch import Launch
from src.training import folder as module
from src.training.folder import ENVIRONMENT_KEY, run_folder

SINGLE = Launch(0, 1, "single")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (
        ENVIRONMENT_KEY,
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "TORCHELASTIC_RUN_ID",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_JOB_NAME",
    ):
        monkeypatch.delenv(name, raising=False)


class FixedClock:
    @staticmethod
    def now():
        return datetime(2026, 1, 2, 3, 4, 5)


def test_runs_that_start_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "datetime", FixedClock)
    names = [run_folder(str(tmp_path), None, SINGLE).relative_to(tmp_path) for _ in range(3)]
    base = Path("runs/2026-01-02")
    assert names == [base / "03-04-05", base / "03-04-05-2", base / "03-04-05-3"]


def test_many_at_once_get_one_each(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "datetime", FixedClock)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(run_folder(str(tmp_path), None, SINGLE))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 16


def test_a_folder_that_was_asked_for_may_exist(tmp_path):
    assert run_folder("unused", str(tmp_path / "mine"), SINGLE) == tmp_path / "mine"
    assert run_folder("unused", str(tmp_path / "mine"), SINGLE) == tmp_path / "mine"


def test_processes_that_lightning_starts_inherit_it(tmp_path):
    made = run_folder(str(tmp_path), None, SINGLE)
    assert run_folder("elsewhere", None, Launch(1, 0, "child")) == made
    del os.environ[ENVIRONMENT_KEY]


def test_slurm_tasks_meet_at_a_file_of_their_job_step(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    found = {}
    others = [
        threading.Thread(
            target=lambda r=rank: found.update({r: run_folder(str(tmp_path), None, Launch(r, 3, "slurm"))})
        )
        for rank in (1, 2)
    ]
    for thread in others:
        thread.start()
    found[0] = run_folder(str(tmp_path), None, Launch(0, 3, "slurm"))
    for thread in others:
        thread.join()
    assert len(set(found.values())) == 1 and found[0].is_dir()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert run_folder(str(tmp_path), None, Launch(0, 3, "slurm")) != found[0]


def test_slurm_with_a_chosen_folder_where_nothing_was_logged_before(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    wanted = str(tmp_path / "mine")
    folders = [run_folder(str(tmp_path / "logs"), wanted, Launch(rank, 2, "slurm")) for rank in (0, 1)]
    assert folders == [tmp_path / "mine"] * 2


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"paths\.log_dir"):
        run_folder(str(tmp_path / "file"), None, SINGLE)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, SINGLE),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "none"}, Launch(3, 8, "torchrun")),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, Launch(2, 4, "slurm")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, SINGLE),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, SINGLE),
        ({"LOCAL_RANK": "1"}, Launch(1, 0, "child")),
    ],
)
def test_who_started_this_process(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Launch.detect() == expected
