"""Stop a run on a signal, or on an error in one of its parts.

After the first request the run finishes its update and saves; a Ctrl-C after that ends the process at once.
"""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from src.core.errors import UserError
from src.core.files import remove_unfinished

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Signals that ask a run to stop. It exits with 128 + the signal's number, as shells report it: 130, 143, 129, 138."""
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
"""SIGTERM on Windows, which has no SIGKILL."""
FAILED = 1
"""Exit code of a run that stopped on an error in one of its parts."""
STUCK_S = 5.0  # time for a Python handler to run; if it hasn't, a library call blocks it
_FORWARDED_WITHIN_S = 1.0  # launchers forward signals that the terminal already sent to all processes: one request


def status_of(code: int) -> str:
    """Return the status that the run record gives an exit code: terminated, interrupted or failed."""
    if code == 128 + signal.SIGTERM:
        return "terminated"
    return "interrupted" if code in [128 + number for number in SIGNALS] else "failed"


def signal_name(code: int) -> str:
    """Return the name of the signal of an exit code above 128."""
    return signal.Signals(code - 128).name


class StopRequest:
    """State of the stop request. The only instance is `STOP`, since signals are per process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Clear the request and its settings."""
        self.code = 0
        """Requested exit code; 0: no request."""
        self.error: UserError | None = None
        """The error that stops the run; None if only a signal did."""
        self.deferred = False
        """Whether the trainer checks `code` after each update; else a signal raises SystemExit immediately."""
        self.loud = True
        """Whether this process prints messages for the user."""
        self._asked_at = math.inf
        self.before_exit: Callable[[int], None] = lambda code: None
        """Called with the exit code by `end_now`."""
        self._first_at: float | None = None
        self._ending = False

    def fail(self, error: UserError) -> None:
        """Request a stop after this update because of `error`. The first error counts."""
        if self.error is None:
            self.error = error
        self._asked_at = min(self._asked_at, time.monotonic())
        self.code = self.code or FAILED

    def ask(self, number: int) -> None:
        """Request a stop because of a signal. It overrides the code of `fail`; the first signal counts."""
        if self.code >= 128:
            return
        self._asked_at = min(self._asked_at, time.monotonic())
        self.code = 128 + number
        if self.loud and self.deferred:
            name = signal.Signals(number).name
            _print_to_stderr(
                f"{name}: the update is finished and saved, then the run ends. Ctrl-C ends it at once, without saving."
            )

    @property
    def waiting_s(self) -> float:
        """Seconds since the request; 0 without one."""
        return max(0.0, time.monotonic() - self._asked_at)

    def count(self, number: int) -> None:
        """Count signals as they arrive: a Ctrl-C after another signal ends the process, as does any if the process is stuck."""
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            if not self.deferred:  # e.g. while it waits for other ranks to join
                timer = threading.Timer(STUCK_S, lambda: self._end_if_stuck(now, number))
                timer.daemon = True
                timer.start()
        elif number == signal.SIGINT and now - self._first_at > _FORWARDED_WITHIN_S:
            self.end_now(128 + number)

    def _end_if_stuck(self, since: float, number: int) -> None:
        if self._first_at == since and self.code < 128:
            self.end_now(128 + number)

    def end_now(self, code: int) -> None:
        """End this process and its data-loading workers at once; unfinished files are removed."""
        if self._ending:
            return
        self._ending = True
        if self.loud:
            _print_to_stderr("Ended at once; unsaved progress is lost.")
        for child in multiprocessing.active_children():  # others end with this process, on Linux (end_with_parent)
            child.kill()
        with suppress(Exception):
            self.before_exit(code)
        remove_unfinished()
        os._exit(code)


STOP = StopRequest()


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Handle SIGNALS inside the block; ignored ones (as under nohup) stay ignored.

    A Python handler can't run while the process is inside a library call, such as a collective that hangs. So a thread
    listens too, woken immediately through the signal wakeup fd.
    """
    STOP.reset()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield STOP
        return

    def handle(number: int, frame: object) -> None:
        first = STOP.code < 128
        STOP.ask(number)
        if first and not STOP.deferred:
            raise SystemExit(STOP.code)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    reader, writer = os.pipe()
    if hasattr(os, "set_blocking"):  # on Windows since Python 3.12
        os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader,), name="stop requests", daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in handled:
        signal.signal(number, handle)
    try:
        yield STOP
    finally:
        for number in handled:
            signal.signal(number, before[number])
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        thread.join()
        STOP.reset()  # the request doesn't apply to what runs next in this process


def _watch(reader: int) -> None:
    with os.fdopen(reader, "rb", buffering=0) as stream:
        while numbers := stream.read(64):
            for number in numbers:
                if number in SIGNALS:
                    STOP.count(number)


def ignore_in_worker(worker: int = 0) -> None:
    """Make a data-loading worker ignore SIGNALS, which may go to the whole process group, and end with its parent.

    Training still needs its next batch to stop cleanly.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(KILL)


def end_with_parent(number: int) -> None:
    """Have the kernel send signal `number` to this process when its parent ends. Linux only."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG


def _reset_wakeup_fd() -> None:
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)  # else signals to a forked child would count as the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_wakeup_fd)


def _print_to_stderr(text: str) -> None:
    with suppress(OSError):  # not through logging: a signal may have interrupted it in a write
        erase = "\r\x1b[2K" if os.isatty(2) else ""  # a progress bar on this line
        os.write(2, f"{erase}{text}\n".encode())
