"""Run folders: one for all processes of a launch and one for each job of a sweep, never that of another run."""

import json
import os
import socket
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from src import eval_rfid
from src.core.distributed import Launch, processes
from src.core.errors import UserError
from src.core.folder_lock import owner_of, take_lock
from src.core.weights import PROJECT_ROOT
from src.training import record as module
from src.training.record import make_folder
from src.training.run import run
from src.training.trainer import build_trainer
from tests.training import QUIET, SMALL, composed, python

FAST = [*SMALL, *QUIET, "trainer.max_epochs=1", "trainer.limit_train_batches=1"]


def test_runs_that_start_in_the_same_second_get_different_folders(tmp_path, monkeypatch):
    fixed = type("Fixed", (), {"now": staticmethod(lambda: datetime(2026, 1, 2, 3, 4, 5))})
    monkeypatch.setattr(module, "datetime", fixed)
    base, found = tmp_path / "runs/2026-01-02", []
    threads = [threading.Thread(target=lambda: found.append(make_folder(str(tmp_path), None))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {base / "03-04-05", *(base / f"03-04-05-{number}" for number in range(2, 9))}
    assert all(folder.is_dir() for folder in found)


def test_requested_folder_may_exist_and_hold_other_files(tmp_path):
    mine = tmp_path / "above" / "mine"
    assert make_folder("unused", str(mine)) == mine
    (mine / "notes.txt").write_text("mine")
    assert make_folder("unused", str(mine)) == mine


@pytest.mark.parametrize(
    ("checkpoint", "job", "saved", "allowed"),
    [
        (None, None, True, False),
        (None, None, False, False),
        ("inside", None, True, True),
        ("elsewhere", None, True, False),
        ("elsewhere", "7", True, False),
        (None, "7", True, False),  # the batch script passes its checkpoint
        (None, "7", False, True),
        ("elsewhere", "7", False, True),
        (None, "8", False, False),
        ("inside", "8", True, True),
    ],
)
def test_run_folder_is_reused_only_by_its_resume_or_slurm_job(tmp_path, monkeypatch, checkpoint, job, saved, allowed):
    folder = tmp_path / "run"
    last = folder / "checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "failed", "slurm_job": job}))
    if saved:
        last.write_bytes(b"weights")
    places = {"inside": tmp_path / "x/../run/checkpoints/best.ckpt", "elsewhere": tmp_path / "run2/last.ckpt"}
    given = places.get(checkpoint)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if allowed:
        assert make_folder("unused", str(folder), given) == folder
        return
    with pytest.raises(UserError, match=r"already holds a run.*paths\.run_dir=null") as caught:
        make_folder("unused", str(folder), given)
    assert (f"ckpt_path={last}" in str(caught.value)) == saved
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(UserError, match="already holds a run"):
        make_folder("unused", str(folder), given)


def test_running_run_locks_its_folder_until_its_process_ends(tmp_path):
    pytest.importorskip("fcntl")
    code = "import sys, time; from pathlib import Path; from src.core.folder_lock import take_lock\nheld = take_lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"still going on in {tmp_path} \(process {process.pid} on .*kill -INT"):
            take_lock(tmp_path)
        assert f"process {process.pid} on" in owner_of(tmp_path)
    finally:
        process.kill()
        process.wait()
    assert owner_of(tmp_path) == ""
    with take_lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            take_lock(tmp_path)
    take_lock(tmp_path).close()


def test_folder_that_can_not_be_locked_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"gone can't be written: No such file.*paths\.log_dir, --output"):
        take_lock(tmp_path / "gone")


def test_without_fcntl_nothing_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr("src.core.folder_lock.fcntl", None)
    with take_lock(tmp_path), take_lock(tmp_path):
        assert owner_of(tmp_path) == ""


def test_second_run_in_a_folder_keeps_the_checkpoints_of_the_first(tmp_path, caplog):
    """A second run is rejected; a resume continues inside, or in another folder while the first run still trains."""

    def start(*overrides):
        run(composed([*FAST, "model.disc_weight=0", f"paths.log_dir={tmp_path}", *overrides]))

    start(f"paths.run_dir={tmp_path / 'run'}")
    last = tmp_path / "run/checkpoints/last.ckpt"
    saved = {path.name: path.read_bytes() for path in last.parent.iterdir()}
    with pytest.raises(SystemExit):
        start(f"paths.run_dir={tmp_path / 'run'}")
    assert {path.name: path.read_bytes() for path in last.parent.iterdir()} == saved
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
    start(f"paths.run_dir={tmp_path / 'run'}", f"ckpt_path={last}", "trainer.max_epochs=2")
    assert json.loads((tmp_path / "run/run.json").read_text())["result"]["step"] == 2
    assert (last.parent / "best.ckpt").is_file() and not list(last.parent.glob(".*"))
    with take_lock(tmp_path / "run"):
        caplog.clear()
        start(f"ckpt_path={last}", "trainer.max_epochs=2")
        (beside,) = tmp_path.glob("runs/*/*")
        assert "still going on" in (beside / "run.log").read_text()


@pytest.mark.parametrize("own", [True, False])
def test_run_rejected_before_its_first_update_leaves_no_folder(tmp_path, own):
    """Neither its own, wherever that is, nor that of the day; a folder that existed before stays."""
    (tmp_path / "before").mkdir()
    words = [f"paths.log_dir={tmp_path}/logs", f"data.data_dir={tmp_path}/nothing"]
    for folder in ("mine", "before") if own else (None,):
        with pytest.raises(SystemExit):
            run(composed([*FAST, *words, *([f"paths.run_dir={tmp_path}/{folder}"] if folder else [])]))
    assert (
        not (tmp_path / "mine").exists() and (tmp_path / "before").is_dir() and not list(tmp_path.glob("logs/runs/*"))
    )


@pytest.mark.parametrize(("log_dir", "wanted"), [("file", None), ("logs", "file"), ("logs", "file/mine")])
def test_unwritable_folder_is_an_error(tmp_path, log_dir, wanted):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"paths\.log_dir"):
        make_folder(str(tmp_path / log_dir), wanted and str(tmp_path / wanted))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 1, "single")),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "none"}, Launch(3, 8, "torchrun")),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, Launch(3, 8, "torchrun")),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Launch(3, 8, "torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 1, "single")),
        ({"RANK": "0", "LOCAL_RANK": "1"}, Launch(1, 0, "child")),
        ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, Launch(2, 4, "slurm")),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, Launch(2, 4, "slurm")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch(0, 1, "single")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, Launch(0, 1, "single")),
        ({"LOCAL_RANK": "1"}, Launch(1, 0, "child")),
        ({"LOCAL_RANK": "1", "NODE_RANK": "2"}, Launch(2, 0, "child")),
    ],
)
def test_launcher_is_detected_from_the_environment(monkeypatch, environment, expected):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_NTASKS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Launch.detect() == expected
    assert expected.main == (expected.rank == 0)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    if expected.kind == "single":
        with pytest.raises(UserError, match="mpirun started 4 processes"):
            Launch.detect()
    else:
        assert Launch.detect() == expected


@pytest.mark.parametrize(
    ("variable", "launcher"), [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")]
)
def test_evaluation_scripts_are_not_run_several_times_over(monkeypatch, capsys, variable, launcher):
    """Each process would do all of the work and write the same files."""
    monkeypatch.setenv(variable, "8")
    assert eval_rfid.main(["--checkpoint", "none.ckpt", "--data_dir", "none", "--device", "cpu"]) == 1
    assert f"{launcher} started 8 processes" in capsys.readouterr().err
    monkeypatch.setenv(variable, "1")
    with processes("cpu") as process:
        assert process.world == 1


@pytest.mark.parametrize(
    ("local", "nodes", "expected"),
    [
        ({}, 1, (3, 3, 4)),
        ({"LOCAL_RANK": "1"}, 2, (3, 1, 2)),
        ({}, 2, (3, 1, 2)),
        ({"LOCAL_RANK": "0"}, 4, (3, 0, 1)),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 1, (3, 1, 2)),  # torchrun, trainer.num_nodes forgotten
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 8, (3, 1, 2)),
    ],
)
def test_processes_started_on_several_machines(monkeypatch, local, nodes, expected):
    """By torchrun, or by Kubernetes, which may name neither LOCAL_RANK nor LOCAL_WORLD_SIZE."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # the strategy sets it for the whole process
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "")  # so that monkeypatch removes it at the end
        monkeypatch.delenv(name)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", **local}.items():
        monkeypatch.setenv(name, value)
    settings = OmegaConf.to_container(composed([*FAST, f"trainer.num_nodes={nodes}"]).trainer, resolve=True)
    trainer = build_trainer(settings, Launch.detect(), [], [], ".")
    assert (trainer.global_rank, trainer.local_rank, trainer.num_devices) == expected
    assert trainer.world_size == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="4 processes, 3 on this machine"):
        build_trainer(settings, Launch.detect(), [], [], ".")


@pytest.mark.parametrize("started_by_srun", [True, False])
def test_slurm_tasks_without_ntasks_per_node_are_an_error(monkeypatch, started_by_srun):
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    launch = Launch(0, 4, "slurm") if started_by_srun else Launch(0, 1, "single")
    settings = OmegaConf.to_container(composed(FAST).trainer, resolve=True)
    with pytest.raises(UserError, match="4 tasks by --ntasks alone.*--ntasks-per-node=4"):
        build_trainer(settings, launch, [], [], ".")


LATE = """
import os, sys, time, runpy, torch.distributed as dist

def late(owner, name):
    function = getattr(owner, name)

    def delayed(*args, **options):
        setattr(owner, name, function)
        time.sleep(0.5 * int(os.environ["RANK"]))
        return function(*args, **options)

    setattr(owner, name, delayed)

late(dist.TCPStore, "get")
late(dist, "init_process_group")
late(dist, "broadcast_object_list")
del sys.argv[0]
sys.path.insert(0, "")
runpy.run_path("src/train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_three_processes_without_torchrun_share_one_folder(tmp_path):
    """As Kubernetes starts them, without LOCAL_RANK; what rank 0 provides must stay until the others have read it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-c", LATE, "src/train.py", *FAST, "data.batch_size=1", f"paths.log_dir={tmp_path}"]
    ranks = [
        subprocess.Popen(
            command, cwd=PROJECT_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **place, "RANK": str(rank)},
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


@pytest.mark.slow
def test_jobs_of_a_sweep_with_two_processes_each_are_independent(tmp_path):
    """Nothing of one job is left in the process of the next: ranks, ports, arguments, thread counts."""
    script = tmp_path / "train.py"
    script.write_text(SWEEP.format(root=str(PROJECT_ROOT)))
    words = [*FAST, "trainer=ddp_sim", f"paths.log_dir={tmp_path}", "experiment_name=first,second"]
    python(script, "-m", *words, threads="")
    for number, name in enumerate(["first", "second"]):
        (folder,) = tmp_path.glob(f"multiruns/*/*/{number}")
        record = json.loads((folder / "run.json").read_text())
        assert (record["experiment_name"], record["status"], record["processes"]) == (name, "finished", 2)
        assert f"experiment_name={name}" in record["command"] and "-m" not in record["command"]
        assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert not list(Path(tmp_path).glob("runs"))


@pytest.mark.slow
def test_bad_value_in_a_sweep_leaves_the_other_jobs_alone(tmp_path):
    words = [
        *FAST,
        "model.disc_weight=0",
        f"paths.log_dir={tmp_path}",
        "model.optimizer.lr=1e-3,-1,2e-3",
        "seed=range(1)",
    ]
    said = python("src/train.py", "-m", *words, code=1)
    rows = said[said.index("The sweep, 3 jobs:") :].splitlines()[1:4]
    assert [row.split()[2] for row in rows] == ["finished", "failed", "finished"], rows
    assert "model.optimizer.lr=-1 seed=0" in rows[1] and "more than 0" in rows[1] and "val/loss" in rows[0]
    assert len(list(tmp_path.glob("multiruns/*/*/*/checkpoints/last.ckpt"))) == 2


SWEEPER = """
import runpy, sys
from hydra._internal.hydra import Hydra
multirun = Hydra.multirun
def of_nothing(*arguments, **options):
    multirun(*arguments, **options)
    raise ValueError("No trials are completed yet.")  # Optuna's
Hydra.multirun = of_nothing
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_sweep_whose_jobs_all_fail_ends_in_its_table(tmp_path):
    words = [*FAST, f"paths.log_dir={tmp_path}", "data.data_dir=no/a,no/b", "model.optimizer.betas=[0.9,0.95]"]
    said = python("-c", SWEEPER, "src/train.py", "-m", *words, code=1)
    assert said.count("failed    No dataset at") == 2 and said.endswith("No trials are completed yet.\n")
    assert "betas" not in said[said.index("The sweep") :]


SWALLOWED = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:  # as some compiled modules do
                raise ImportError("type is already registered")
sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_ctrl_c_while_libraries_are_imported_is_one_line():
    said = python("-c", SWALLOWED, "src/train.py", "experiment=rae_dummy", code=130)
    assert said == "interrupted before the run began\n"
