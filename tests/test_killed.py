"""Runs that are ended from outside: in this process if a signal is enough, else in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import kill_and_resume
from src.callbacks import scores
from src.callbacks.rfid_callback import RFIDCallback
from src.core.stopping import SIGNALS, STOP
from src.core.weights import PROJECT_ROOT, read
from src.metrics.reconstruction import ReconstructionScore
from src.training.run import run
from src.training.stage1 import RAEModule
from tests.tiny_models import two_processes
from tests.training import QUIET, SMALL, composed

CHEAP = [*SMALL, *QUIET, "callbacks.checkpoint.every_n_steps=0", "model.disc_weight=0", "model.perceptual_weight=0"]


def run_and_signal(folder, monkeypatch, numbers, overrides=(), base=CHEAP):
    """Run training in this process and signal it in its second update; return the exit code."""
    original = RAEModule.training_step

    def training_step(self, batch, batch_idx):
        for number in numbers if self.global_step == 1 else ():
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(RAEModule, "training_step", training_step)
    before = {sent: signal.getsignal(sent) for sent in SIGNALS}
    try:
        run(composed([*base, f"paths.run_dir={folder}", *overrides]))
        code = 0
    except SystemExit as error:
        code = error.code
    assert {sent: signal.getsignal(sent) for sent in SIGNALS} == before
    return code


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize(
    ("name", "code", "status"),
    [("SIGINT", 130, "interrupted"), ("SIGHUP", 129, "interrupted"), ("SIGUSR1", 138, "interrupted"), ("SIGTERM", 143, "terminated")],
)  # fmt: skip
def test_signal_finishes_the_update_and_saves(tmp_path, monkeypatch, name, code, status):
    assert run_and_signal(tmp_path / "run", monkeypatch, [signal.Signals[name]]) == code
    file = tmp_path / "run/checkpoints/last.ckpt"
    assert read(file)["global_step"] == 2
    assert (record_of(tmp_path / "run")["status"], record_of(tmp_path / "run")["error"]) == (status, name)
    log = (tmp_path / "run/run.log").read_text()
    assert f"{name}: saved {file} at step 2" in log and f"ckpt_path={file}" in log
    for page in ("configs/hydra/default.yaml", "docs/distributed.md"):
        assert str(code) in (PROJECT_ROOT / page).read_text()


def test_score_is_kept_if_a_signal_arrives_during_the_evaluation(tmp_path, monkeypatch):
    def evaluate(self, trainer, pl_module, name):
        pl_module.record_scores({self.monitor: 1.0})
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RFIDCallback, "evaluate", evaluate)
    scored = ["logger=csv", "callbacks.rfid.rfid_every_n_steps=2", "callbacks.rfid.inception_weights=tiny"]
    assert run_and_signal(tmp_path / "run", monkeypatch, [], base=[*SMALL, *scored]) == 143
    best, last = (read(tmp_path / f"run/checkpoints/{name}.ckpt") for name in ("best", "last"))
    assert best["global_step"] == last["global_step"] == 2
    assert {"monitor": "rfid_untrained/score", "best": 1.0} in last["callbacks"].values()


@pytest.mark.parametrize("when", ["rfid_every_n_steps=2", "full_at_end=true"])
def test_evaluation_that_outlasts_the_grace_period_is_skipped_and_the_run_saved(tmp_path, monkeypatch, when):
    monkeypatch.setattr(scores, "GRACE_S", 0.0)
    scored, original = [], ReconstructionScore.update

    def update(self, *batch):
        scored.append(STOP.code)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *batch)

    monkeypatch.setattr(ReconstructionScore, "update", update)
    words = [
        "rfid_every_n_steps=0",
        "rfid_every_epoch=false",
        when,
        "rfid_num_samples=6",
        "rfid_batch_size=2",
        "inception_weights=tiny",
    ]
    overrides = [*(f"callbacks.rfid.{word}" for word in words), "trainer.max_epochs=1", "logger=csv"]
    at_end = when.startswith("full")
    assert run_and_signal(tmp_path / "run", monkeypatch, [], overrides, base=SMALL) == (0 if at_end else 143)
    assert scored == [0] and "is skipped" in (tmp_path / "run/run.log").read_text()
    assert read(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == (3 if at_end else 2)


@pytest.mark.slow
def test_all_ranks_skip_an_evaluation_at_the_same_batch():
    code = """
import sys, types
import torch.distributed as dist
from src.callbacks import scores
from src.core.distributed import RankRequests
from src.core.stopping import STOP
dist.init_process_group("gloo")
rank, done, scores.GRACE_S = dist.get_rank(), [], 0.0
callback = types.SimpleNamespace(_requests=RankRequests())
for asked in (False, True):
    try:
        for part in scores.ScoreCallback.until_overdue(callback, range(3 - rank), 3, 2):
            done.append(part)
            if asked and rank == 1:
                STOP.ask(15)
    except scores._Overdue:
        done.append("skipped")
    dist.barrier()
sys.stdout.write(f"{rank}: {done}\\n")
"""
    said = two_processes("-c", code)
    assert "0: [0, 1, 2, 0, 1, 'skipped']" in said and "1: [0, 1, 0, 1, 'skipped']" in said


def test_loss_of_another_process_ends_in_one_message(tmp_path, monkeypatch, capfd):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("[pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer.")  # gloo's

    monkeypatch.setattr(RAEModule, "training_step", training_step)
    with pytest.raises(SystemExit) as ended:
        run(composed([*CHEAP, f"paths.run_dir={tmp_path / 'run'}"]))
    said = capfd.readouterr().err
    assert ended.value.code == 1 and "Another process of this run is gone" in said and "Traceback" not in said


def test_signals_ignored_at_the_start_stay_ignored(tmp_path, monkeypatch):
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        assert run_and_signal(tmp_path / "run", monkeypatch, SIGNALS, overrides=["trainer.max_steps=3"]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert record_of(tmp_path / "run")["status"] == "finished"


def test_without_checkpoints_a_signal_ends_the_run(tmp_path, monkeypatch):
    assert run_and_signal(tmp_path / "run", monkeypatch, [signal.SIGINT], ["callbacks=watch"]) == 130
    assert record_of(tmp_path / "run")["status"] == "interrupted"


HANGING = """
import ctypes, os, signal, sys, time
from multiprocessing import get_context
from pathlib import Path
from src.core.files import replacing
from src.core import stopping
from src.core.stopping import STOP, ignore_in_worker, listening

def work(file):
    ignore_in_worker()
    file.write_text(str(os.getpid()))
    time.sleep(600)

stopping.STUCK_S = 0.5
with listening():
    STOP.deferred, folder = len(sys.argv) == 2, Path(sys.argv[1])
    get_context("fork").Process(target=work, args=(folder / "worker",), daemon=True).start()
    with replacing(folder / "last.ckpt") as file:
        file.write(b"half")
        (folder / "ready").touch()
        mutex = (ctypes.c_char * 128)()
        for _ in range(2):  # a call of a library that never returns and that no signal interrupts
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def hang(folder, *words):
    """Start HANGING and wait until it hangs."""
    command = [sys.executable, "-c", HANGING, str(folder), *words]
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stderr=subprocess.PIPE)
    kill_and_resume.wait_for(lambda: (folder / "ready").exists() and kill_and_resume.text(folder / "worker"), process)
    return process


def test_signal_ends_a_process_that_hangs_before_it_trains(tmp_path):
    """For example a rank that waits for others to join."""
    process = hang(tmp_path, "before")
    time.sleep(0.5)  # time to reach the call that hangs
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143
    gone([int((tmp_path / "worker").read_text())])


def test_second_ctrl_c_ends_a_hanging_process_its_children_and_its_partial_files(tmp_path):
    process = hang(tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # at once: a launcher forwards what the terminal has already sent
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    process.send_signal(signal.SIGTERM)  # a scheduler repeats its signal: the save continues
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    gone([int((tmp_path / "worker").read_text())])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ready", "worker"]


def gone(pids, patience=10.0):
    """Check that processes end within `patience` seconds."""
    deadline = time.monotonic() + patience
    for pid in pids:
        while (state := kill_and_resume.text(Path(f"/proc/{pid}/stat"))) and ") Z " not in state:
            assert time.monotonic() < deadline, f"{pid} is still running: {state}"
            time.sleep(0.1)


def at_step(log_dir, step, process):
    kill_and_resume.wait_for(
        lambda: any(f"step {step}:" in kill_and_resume.text(f) for f in log_dir.glob("runs/*/*/run.log")), process
    )


LONG = ["callbacks.checkpoint.every_n_steps=0", "trainer.max_epochs=100"]


def ended_well(log_dir, status):
    """Check what a stopped run leaves: its record, and a checkpoint of the last update in its log."""
    (log,) = log_dir.glob("runs/*/*/run.log")
    lines = [line for line in log.read_text().splitlines() if " step " in line and ": grad_norm" in line]
    assert read(kill_and_resume.newest(log_dir))["global_step"] >= int(lines[-1].split("step ")[1].split(":")[0])
    assert record_of(log.parent)["status"] == status
    assert not list(log_dir.glob("runs/*/*/checkpoints/.*"))


@pytest.mark.parametrize(
    ("processes", "word", "number", "code", "status"),
    [
        # a terminal signals the workers too
        (1, "data.num_workers=2", signal.SIGINT, 130, "interrupted"),
        # the first process's code counts; the second's must not look like a crash to Lightning, which would then kill both
        pytest.param(1, "trainer=ddp_sim", signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),
        # torchrun has an exit code of its own
        pytest.param(2, "data.num_workers=1", signal.SIGINT, 1, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_signal_to_the_launcher_and_all_its_processes_saves_and_ends_them(
    tmp_path, processes, word, number, code, status
):
    process = kill_and_resume.start(tmp_path, processes, *LONG, word)
    at_step(tmp_path, 3, process)
    others = kill_and_resume.children(process.pid)
    assert len(others) >= 2 * processes - ("ddp" in word)
    os.killpg(process.pid, number)
    assert process.wait(timeout=90) == code
    ended_well(tmp_path, status)
    gone(others)


@pytest.mark.slow
def test_nohup_and_second_ctrl_c(tmp_path):
    """SIGHUP changes nothing; when the ranks hang, the second Ctrl-C leaves no process of either and no partial file."""
    hanging = "    if batch_idx == 4: pathlib.Path({pid!r}).touch(); time.sleep(600)\n    return original(self, batch, batch_idx)\n"
    body = "original = RAEModule.training_step\n\ndef training_step(self, batch, batch_idx):\n" + hanging
    command = ["nohup", *patched(tmp_path, body, tmp_path / "hangs"), *LONG, "data.num_workers=1"]
    with open(tmp_path / "output.txt", "wb") as output:
        process = subprocess.Popen(
            command, cwd=PROJECT_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    kill_and_resume.wait_for(lambda: (tmp_path / "hangs").exists(), process)
    others = kill_and_resume.children(process.pid)
    assert len(others) >= 3
    os.killpg(process.pid, signal.SIGHUP)
    os.killpg(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130, (tmp_path / "output.txt").read_text()[-2000:]
    gone(others)
    (record,) = tmp_path.glob("runs/*/*/run.json")
    assert '"status": "interrupted"' in record.read_text() and "ended at once by SIGINT" in record.read_text()
    assert not list(tmp_path.glob("runs/**/.*.writing"))


PATCHED = """
import faulthandler, os, pathlib, sys, time
faulthandler.dump_traceback_later(90)  # says where each process waits, should a run hang
sys.path[0] = {root!r}
from src.training.stage1 import RAEModule
{body}
RAEModule.training_step = training_step
program = os.path.join({root!r}, "src", "train.py")
exec(compile(open(program).read(), program, "exec"), {{"__name__": "__main__", "__file__": program}})
"""
FAILING = """
import atexit
from lightning_fabric.strategies.launchers import subprocess_script
subprocess_script._ChildProcessObserver.__init__.__defaults__ = (0.05,)  # Lightning looks for failed processes this often
atexit.register(time.sleep, 1)
def training_step(self, batch, batch_idx):
    if self.global_rank == 0:
        while not pathlib.Path({pid!r}).exists():
            time.sleep(0.1)
        raise RuntimeError("the first process fails")
    pathlib.Path({pid!r}).write_text(str(os.getpid()))
    time.sleep(600)  # as one that waits in a collective of nccl
"""


def patched(folder, body, pid):
    """Return the command of a two-process run with another `training_step`; `pid`: a file that `body` writes."""
    script = folder / "train.py"
    script.write_text(PATCHED.format(root=str(PROJECT_ROOT), body=body.format(pid=str(pid))))
    return [sys.executable, str(script), *kill_and_resume.RUN, "trainer=ddp_sim", f"paths.log_dir={folder}"]


@pytest.mark.slow
def test_failure_of_the_first_process_ends_those_that_lightning_started(tmp_path):
    pid, environment = tmp_path / "pid", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = patched(tmp_path, FAILING, pid)
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1 and "the first process fails" in done.stderr, done.stderr[-2000:]
    (record,) = tmp_path.glob("runs/*/*/run.json")
    assert '"status": "failed"' in record.read_text()
    gone([int(pid.read_text())])


@pytest.mark.slow
def test_run_killed_at_hard_moments_resumes_exactly(tmp_path):
    """The short version; `--kills 20` is the long one."""
    command = [sys.executable, "scripts/kill_and_resume.py", "--kills", "3", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and "same bit for bit" in done.stdout, done.stdout + done.stderr
    assert "NO" not in done.stdout
