"""Runs that are ended from outside, as programs of their own."""

import os
import signal
import subprocess
import sys
import time

from scripts import kill_and_resume
from src.weights import PROJECT_ROOT, read


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


def test_sigkill_at_hard_moments_and_resumed(tmp_path):
    """The short form; `--kills 20` is the long one."""
    done = subprocess.run(
        [sys.executable, "scripts/kill_and_resume.py", "--kills", "3", "--folder", str(tmp_path)],
        cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NO" not in done.stdout and "same bit for bit" in done.stdout
