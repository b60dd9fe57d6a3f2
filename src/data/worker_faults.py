"""Handle data-loading workers that die, hang, or run out of shared memory.

A batch that the workers don't deliver is loaded in the training process, and the run is asked to stop: it finishes the
update on all ranks, saves a checkpoint, and ends with one message.
"""

import atexit
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from src.core.errors import UserError
from src.core.stopping import KILL, STOP

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
SHARE_OF_FREE = 0.8
"""Largest share of free shared memory used for prefetched batches."""
LONGEST_TEMPORARY = 107 - len("/pymp-12345678/listener-12345678")
"""Longest path of the temporary folder, bytes: a socket's path has at most 107 on Linux, and Python appends to it."""
_FEWER_WORKERS = "Use fewer workers (data.num_workers)"
_MORE_SHM = "In a container, give it more shared memory (docker run --shm-size=16g)"


START_S = (5.0, 30.0)
"""Seconds that a forked worker may take to start, at the first and the second try."""


class _WorkerDied(Exception):
    """Raised while waiting for a batch."""


class _DeathWatch:
    """A SIGCHLD handler that raises only while waiting for a batch; torch's own raises anywhere, even within an update."""

    def __init__(self) -> None:
        self._waiting_for: Any = None

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, self._check)

    def wait(self, iterator: Any, call: Callable[[Any], Any], argument: Any) -> Any:
        """Return `call(argument)`. Raises _WorkerDied if a worker of `iterator` has died; None skips the check."""
        self._waiting_for = iterator
        try:
            self._check()
            return call(argument)
        finally:
            self._waiting_for = None

    def _check(self, *_: Any) -> None:
        if self._waiting_for is not None and _dead(self._waiting_for):
            raise _WorkerDied


_WATCH = _DeathWatch()


def batches_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield all batches of `loader`, even if its workers fail.

    Raises:
        UserError: as raised by the dataset, without the traceback that a worker adds.
    """
    if not loader.num_workers:
        yield from loader
        return
    iterator: Any = loader._iterator  # from the previous pass, with persistent workers
    begun, done = False, 0
    while True:
        try:
            if not begun:
                iterator, begun = _WATCH.wait(iterator, iter, loader), True
                _WATCH.install()  # replaces torch's, installed by the first iterator of a process
            batch = _WATCH.wait(iterator, next, iterator)
        except StopIteration:
            return
        except UserError as error:
            marker = f"{UserError.__module__}.{UserError.__qualname__}: "
            raise UserError(str(error).rpartition(marker)[2].strip()) from None
        except Exception as error:  # a worker that died may leave a half-sent batch
            if iterator is None or not _is_fault(error, iterator):
                raise
            _stop_run(loader, iterator)
            break
        yield batch
        done += 1
    for items in itertools.islice(iter(loader.batch_sampler or ()), done, None):
        yield loader.collate_fn([loader.dataset[item] for item in items])


def start_method(name: str) -> Any:
    """Return the multiprocessing context of a start method; a forked worker that does not start is killed and forked again.

    Before Python 3.12 it hangs if, at the moment of the fork, a thread of gloo or nccl was about to acquire the GIL: the
    child needs that thread's lock (HEAD_LOCK in Python/pystate.c) and recreates it only afterwards.
    """
    if name != "fork" or sys.version_info >= (3, 12):
        return multiprocessing.get_context(name)

    class Worker(multiprocessing.context.ForkProcess):
        running = -1  # write end of a pipe, for the new process

        def _bootstrap(self, *arguments: Any, **named: Any) -> int:
            os.write(self.running, b".")
            os.close(self.running)
            return int(super()._bootstrap(*arguments, **named))  # type: ignore[misc]

        @staticmethod
        def _Popen(process: Any) -> Any:
            for patience in START_S:
                reader, process.running = os.pipe()
                started = multiprocessing.context.ForkProcess._Popen(process)  # type: ignore[attr-defined]
                os.close(process.running)
                runs = connection.wait([reader], patience)  # or has exited
                os.close(reader)
                if runs:
                    break
                log.warning("A data-loading worker did not start within %g s: it is started again.", patience)
                os.kill(started.pid, KILL)
                started.wait()
            return started

    class Context(multiprocessing.context.ForkContext):
        Process = Worker  # type: ignore[assignment]

    return Context()


def check_temporary_folder() -> None:
    """Check that workers can use sockets in the temporary folder. Raises UserError if its path is too long: they would hang."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST_TEMPORARY:
        raise UserError(
            f"The path of the temporary folder {folder} is too long for the sockets by which workers hand over batches: expected "
            f"at most {LONGEST_TEMPORARY} bytes. Set a shorter one (export TMPDIR=/tmp), or use no workers (data.num_workers=0)."
        )


def prefetched_batches(workers: int, wanted: int, batch_bytes: int, loaders: int, batch_size: int) -> int:
    """Return how many batches each worker may prefetch, at most `wanted`, so that they fit in shared memory.

    Args:
        workers: per loader.
        batch_bytes: size of one batch.
        loaders: such loaders that use shared memory at the same time on this machine.
        batch_size: images in a batch, for the message.

    Raises:
        UserError: not even one batch per worker fits.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return wanted
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    fit = int(SHARE_OF_FREE * free / (workers * batch_bytes * loaders))
    if fit >= wanted:
        return wanted
    sizes = (
        f"{workers} workers x {loaders} loaders x {wanted} batches of {batch_bytes / 1e6:.0f} MB (data.batch_size="
        f"{batch_size}) need {workers * loaders * wanted * batch_bytes / 1e6:.0f} MB of shared memory, {SHARED_MEMORY} has "
        f"{free / 1e6:.0f} MB free."
    )
    if fit < 1:
        raise UserError(f"{sizes} {_MORE_SHM}, or use fewer workers or none: data.num_workers=0.")
    log.warning("%s Each worker prefetches %d instead. %s.", sizes, fit, _MORE_SHM)
    return fit


def _death_message(code: int | None) -> str:
    name = signal.Signals(-code).name if code is not None and code < 0 else ""
    if name == "SIGKILL":
        return f"A data-loading worker was killed (SIGKILL), as the kernel does when memory runs out. {_FEWER_WORKERS}."
    if name == "SIGBUS":
        full = f"shared memory ({SHARED_MEMORY}) is full"
        return f"A data-loading worker died of a bus error: {full}. {_MORE_SHM}, or {_FEWER_WORKERS.lower()}."
    if code is None:
        return f"A data-loading worker exited, perhaps for lack of memory. {_FEWER_WORKERS}."
    how = f"by {name}" if name else f"with exit code {code}"
    return f"A data-loading worker ended {how}. {_FEWER_WORKERS}; data.num_workers=0 shows what goes wrong."


@atexit.register
def _end_leftovers() -> None:
    """Kill workers that were not closed; Python would send SIGTERM, which they ignore, and wait."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _is_fault(error: Exception, iterator: Any) -> bool:
    text = str(error)
    if "in DataLoader worker process" in text:  # raised by the dataset
        return False
    lost = isinstance(error, (_WorkerDied, ConnectionError, EOFError)) or "pin memory thread" in text
    died = bool(_dead(iterator, patience=2 if lost else 0))  # the exit may show a moment later
    return lost or died or "DataLoader timed out after" in text


def _dead(iterator: Any, patience: float = 0) -> list[Any]:
    """Return the workers that have exited, by their sentinels: `is_alive` must not be called in a signal handler."""
    if iterator._shutdown:  # the pass has ended
        return []
    closed = connection.wait([worker.sentinel for worker in iterator._workers], patience)
    return [worker for worker in iterator._workers if worker.sentinel in closed]


def _stop_run(loader: DataLoader[Any], iterator: Any) -> None:
    dead = _dead(iterator)
    for worker in dead:
        worker.join(2)
    text = (
        f"No batch arrived within {loader.timeout:g} s (data.worker_timeout_s): the disk hangs, or shared memory "
        f"({SHARED_MEMORY}) is full. {_MORE_SHM}, use fewer workers (data.num_workers), or raise the limit."
    )
    if dead:
        text = _death_message(dead[0].exitcode)
    for worker in iterator._workers:
        worker.kill()
    iterator._shutdown_workers()
    loader._iterator = None
    STOP.fail(UserError(text))
    log.warning("%s Until the run can stop, this process loads the batches itself.", text)
