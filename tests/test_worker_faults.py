"""Workers that die or hang, and shared memory that is too small: no batch is lost, the run saves and stops."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from src.core.errors import UserError
from src.core.stopping import STOP, ignore_in_worker
from src.core.weights import PROJECT_ROOT, read
from src.data import worker_faults
from src.data.worker_faults import LONGEST_TEMPORARY, batches_of, prefetched_batches, start_method
from src.training.run import run
from tests.training import SMALL, composed, same, train

QUIET = [*SMALL, "~callbacks.rfid", "logger=csv", "model.disc_weight=0"]


class Numbers:
    """Rows 0..19; a worker that reaches row 9 dies or hangs there."""

    def __init__(self, fault):
        self.fault, self.parent = fault, os.getpid()

    def __len__(self):
        return 20

    def __getitem__(self, row):
        if row == 9 and os.getpid() != self.parent:
            if self.fault == "hangs":
                time.sleep(600)
            if self.fault == "raises":
                raise RuntimeError("of its own")
            os.kill(os.getpid(), self.fault)
        return torch.tensor(row)


def loader_with(fault, timeout=0.0):
    return DataLoader(
        Numbers(fault), batch_size=2, num_workers=2, timeout=timeout, worker_init_fn=ignore_in_worker,
        multiprocessing_context="fork", persistent_workers=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "timeout", "said"),
    [
        (signal.SIGKILL, 0, "killed (SIGKILL), as the kernel does when memory runs out"),
        (signal.SIGBUS, 0, "--shm-size"),
        (signal.SIGSEGV, 600, "ended by SIGSEGV"),
        ("hangs", 2, "No batch arrived within 2 s (data.worker_timeout_s)"),
    ],
    ids=str,
)
def test_no_batch_is_lost_and_the_run_is_asked_to_stop(fault, timeout, said, caplog):
    loader = loader_with(fault, timeout)
    began = time.monotonic()
    for _ in range(2):  # the next pass starts new workers, which fail again
        assert [batch.tolist() for batch in batches_of(loader)] == [[n, n + 1] for n in range(0, 20, 2)]
    assert time.monotonic() - began < 60
    assert STOP.code == 1 and said in str(STOP.error) and "data.num_workers" in str(STOP.error)
    assert sum(said in record.getMessage() for record in caplog.records) == 2


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="fork does not hang there")
@pytest.mark.parametrize("hanging", [1, 2])
def test_worker_that_hangs_after_the_fork_is_restarted(monkeypatch, caplog, hanging):
    """If the new one hangs too, it counts as killed, and no batch is lost either."""
    fork, forked = os.fork, []

    def sometimes_hangs():
        forked.append(fork())
        if forked[-1] == 0 and len(forked) <= hanging:
            time.sleep(600)
        return forked[-1]

    monkeypatch.setattr(os, "fork", sometimes_hangs)
    monkeypatch.setattr(worker_faults, "START_S", (3.0, 3.0))
    loader = DataLoader(Numbers(0), batch_size=2, num_workers=2, multiprocessing_context=start_method("fork"))
    assert [batch.tolist() for batch in batches_of(loader)] == [[n, n + 1] for n in range(0, 20, 2)]
    assert caplog.text.count("is started again") == hanging and len(forked) == 3
    for pid in forked[:hanging]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert STOP.code == (hanging == 2)


def test_death_of_a_worker_waits_for_the_end_of_the_update(monkeypatch):
    """torch's own handler, installed by the first loader of a process, would raise in the middle of it."""
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    loader = loader_with(signal.SIGKILL)
    found, iterator = [], batches_of(loader)
    for batch in iterator:
        found.append(batch.tolist())
        time.sleep(0.3)  # a worker dies in here
    assert len(found) == 10 and STOP.code == 1


def test_death_of_a_worker_between_two_passes_is_noticed_by_the_next():
    """For example of workers that idle while another data set is evaluated; torch would wait `worker_timeout_s` for them."""
    loader = loader_with(0, timeout=30)  # signal 0 does nothing
    whole = [batch.tolist() for batch in batches_of(loader)]
    worker = loader._iterator._workers[0]
    worker.kill()
    worker.join()
    assert [batch.tolist() for batch in batches_of(loader)] == whole
    assert STOP.code == 1 and "killed (SIGKILL)" in str(STOP.error)


def test_errors_of_the_dataset_are_raised():
    with pytest.raises(RuntimeError, match="of its own"):
        list(batches_of(loader_with("raises")))
    assert STOP.code == 0


@pytest.mark.slow
def test_slow_disk_is_no_fault():
    class Slow(Numbers):
        def __getitem__(self, row):
            time.sleep(0.1)
            return super().__getitem__(row)

    loader = DataLoader(Slow(None), batch_size=2, num_workers=1, timeout=1, multiprocessing_context="fork")
    loader.dataset.fault = 0  # signal 0 does nothing
    assert len(list(batches_of(loader))) == 10 and STOP.code == 0


def test_run_saves_at_the_end_of_the_update_and_resumes_bit_for_bit(tmp_path, monkeypatch, caplog):
    """A worker dies between the two micro-batches of an update."""
    halves = ["data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=12", "data.num_workers=2", "trainer.max_epochs=1"]  # fmt: skip
    train(tmp_path / "whole", *QUIET, *halves)
    from src.training.stage1 import RAEModule

    original = RAEModule.training_step

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and not list((tmp_path / "cut").glob("checkpoints/*")):
            for worker in self.trainer.train_dataloader._loader._iterator._workers:
                os.kill(worker.pid, signal.SIGKILL)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(RAEModule, "training_step", training_step)
    with pytest.raises(SystemExit) as ended:
        run(composed([*QUIET, *halves, f"paths.run_dir={tmp_path / 'cut'}"]))
    assert ended.value.code == 1
    log = (tmp_path / "cut/run.log").read_text()
    last = tmp_path / "cut/checkpoints/last.ckpt"
    step = read(last)["global_step"]  # 2, or later if more batches were prefetched
    assert 2 <= step < 6 and f"saved {last} at step {step}" in log and "Traceback" not in log
    STOP.reset()
    train(tmp_path / "rest", *QUIET, *halves, checkpoint=last)
    a, b = (read(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "rest"))
    assert same(a["state_dict"], b["state_dict"]) and same(a["optimizer_states"], b["optimizer_states"])


MB = 10**6


@pytest.mark.parametrize(
    ("free_mb", "workers", "batch_mb", "loaders", "expected"),
    [(1000, 8, 25, 1, 4), (64, 8, 25, 1, None), (64, 2, 10, 1, 2), (64, 2, 10, 2, 1), (64, 2, 10, 4, None), (64, 0, 25, 1, 4), (1, 1, 0.1, 2, 4)],
)  # fmt: skip
def test_prefetched_batches_fit_shared_memory(monkeypatch, caplog, free_mb, workers, batch_mb, loaders, expected):
    monkeypatch.setattr(worker_faults, "SHARED_MEMORY", PROJECT_ROOT)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free_mb, f_frsize=MB))
    arguments = (workers, 4, int(batch_mb * MB), loaders, 128)
    if expected is None:
        with pytest.raises(UserError, match=r"64 MB free.*--shm-size=.*data\.num_workers=0"):
            prefetched_batches(*arguments)
        return
    with caplog.at_level(logging.WARNING):
        assert prefetched_batches(*arguments) == expected
    assert bool(caplog.records) == (expected < 4)


@pytest.mark.parametrize(("length", "fits"), [(LONGEST_TEMPORARY, True), (LONGEST_TEMPORARY + 1, False)])
def test_temporary_folder_with_a_name_too_long_for_sockets_is_rejected(tmp_path, length, fits):
    """The longest allowed name works; without the check a longer one hangs."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short, "x" * (length - len(short) - 1))
        folder.mkdir()
        light = ["data.num_workers=1", "trainer.max_steps=1", f"paths.log_dir={tmp_path}"]
        done = subprocess.run(
            [sys.executable, "src/train.py", *QUIET, *light], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120,
            env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip
    assert done.returncode == (0 if fits else 1) and "Traceback" not in done.stderr, done.stderr
    assert ("expected at most" in done.stderr) != fits


SMALL_MEMORY = """
set -e
mount -t tmpfs -o size=1m tmpfs /dev/shm
exec "$@"
"""


def test_run_with_little_shared_memory_says_so(tmp_path):
    """In a mount namespace whose /dev/shm holds 1 MB; a batch here is 1.6 MB."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    command = ["unshare", "--mount", "bash", "-c", SMALL_MEMORY, "bash", sys.executable, "src/train.py"]
    arguments = [*QUIET, "data.batch_size=128", "data.num_workers=2", f"paths.log_dir={tmp_path}"]
    done = subprocess.run([*command, *arguments], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "MB of shared memory, /dev/shm has 1 MB free" in done.stderr
