"""Runs that are ended from outside, as programs of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts import kill_and_resume
from src.core.weights import PROJECT_ROOT, read


def test_sigterm_saves_and_exits_with_143(tmp_path):
    process = kill_and_resume.start(
        tmp_path, 1, "callbacks.checkpoint.every_n_steps=0", "trainer.max_epochs=100", "data.num_workers=2"
    )
    kill_and_resume.wait_for(
        lambda: any("step 3:" in kill_and_resume.text(f) for f in tmp_path.glob("runs/*/*/run.log")), process
    )
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: loading processes are signalled too
    began = time.monotonic()
    assert process.wait(timeout=60) == 143
    assert time.monotonic() - began < 30
    (log,) = tmp_path.glob("runs/*/*/run.log")
    logged = [
        int(line.split("step ")[1].split(":")[0])
        for line in log.read_text().splitlines()
        if " step " in line and ": grad_norm" in line
    ]
    assert read(kill_and_resume.newest(tmp_path))["global_step"] >= max(logged)
    assert '"status": "terminated"' in log.with_name("run.json").read_text()


def test_sigterm_of_two_processes_that_lightning_started(tmp_path):
    """The first process's exit code counts; the other one's must not look like a crash to Lightning, which kills all then."""
    process = kill_and_resume.start(
        tmp_path, 1, "trainer=ddp_sim", "callbacks.checkpoint.every_n_steps=0", "trainer.max_epochs=100"
    )
    kill_and_resume.wait_for(
        lambda: any("step 3:" in kill_and_resume.text(f) for f in tmp_path.glob("runs/*/*/run.log")), process
    )
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    (log,) = tmp_path.glob("runs/*/*/run.log")
    assert read(kill_and_resume.newest(tmp_path))["global_step"] >= 3
    assert '"status": "terminated"' in log.with_name("run.json").read_text()


FAILING = """
import os, pathlib, sys, time
sys.path[0] = {root!r}
from src.training.stage1 import RAEModule

def training_step(self, batch, batch_idx):
    if self.global_rank == 0:
        while not pathlib.Path({pid!r}).exists():
            time.sleep(0.1)
        raise RuntimeError("the first process fails")
    pathlib.Path({pid!r}).write_text(str(os.getpid()))
    time.sleep(600)  # as one that waits in a collective of nccl

RAEModule.training_step = training_step
program = os.path.join({root!r}, "src", "train.py")
exec(compile(open(program).read(), program, "exec"), {{"__name__": "__main__", "__file__": program}})
"""


def test_a_failure_of_the_first_process_ends_those_that_lightning_started(tmp_path):
    script, pid = tmp_path / "train.py", tmp_path / "pid"
    script.write_text(FAILING.format(root=str(PROJECT_ROOT), pid=str(pid)))
    command = [sys.executable, str(script), *kill_and_resume.RUN, "trainer=ddp_sim", f"paths.log_dir={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "the first process fails" in done.stderr, done.stderr[-2000:]
    (record,) = tmp_path.glob("runs/*/*/run.json")
    assert '"status": "failed"' in record.read_text()
    deadline = time.monotonic() + 10
    while (state := kill_and_resume.text(Path(f"/proc/{pid.read_text()}/stat"))) and ") Z " not in state:
        assert time.monotonic() < deadline, "the other process lives on"
        time.sleep(0.1)


def test_sigkill_at_hard_moments_and_resumed(tmp_path):
    """The short form; `--kills 20` is the long one."""
    done = subprocess.run(
        [sys.executable, "scripts/kill_and_resume.py", "--kills", "3", "--folder", str(tmp_path)],
        cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NO" not in done.stdout and "same bit for bit" in done.stdout
