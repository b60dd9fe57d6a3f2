"""Stop a run from outside or inside: signals, and parts of it that can't go on.

The first request lets the run finish its update and save; Ctrl-C after that ends the process at once, wherever it is.
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
"""Those that ask a run to stop. It exits with 128 + the signal's number, as shells report it: 130, 143, 129, 138."""
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
"""Windows has none."""
FAILED = 1
"""Exit code of a run that stopped because a part of it can't go on."""
STUCK_S = 5.0  # after which a handler in Python has run, unless a call of a library keeps it waiting
_SAME_S = 1.0  # launchers pass on the signal that a terminal has sent to all processes already


def status_of(code: int) -> str:
    """Return the word for an exit code in a run's record."""
    if code == 128 + signal.SIGTERM:
        return "terminated"
    return "interrupted" if code in [128 + number for number in SIGNALS] else "failed"


def signal_name(code: int) -> str:
    """Return the name of the signal that an exit code above 128 stands for."""
    return signal.Signals(code - 128).name


class StopRequest:
    """The request to stop of this process. There is one, `STOP`, since signals belong to a process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the request and whoever waited for it."""
        self.code = 0
        """Exit code that was asked for; 0: no request."""
        self.error: UserError | None = None
        """Why the run can't go on, where no signal asked."""
        self.deferred = False
        """Whether someone looks at `code` after each update; else a signal ends the run where it is."""
        self.loud = True
        """Whether this process tells the user."""
        self._asked_at = math.inf
        self.before_exit: Callable[[int], None] = lambda code: None
        """Called before the process ends at once."""
        self._first_at: float | None = None
        self._ending = False

    def fail(self, error: UserError) -> None:
        """Ask for a stop after this update, because of `error`. The first one counts."""
        if self.error is None:
            self.error = error
        self._asked_at = min(self._asked_at, time.monotonic())
        self.code = self.code or FAILED

    def ask(self, number: int) -> None:
        """Take note of a signal. A signal outweighs what failed; the first signal counts."""
        if self.code >= 128:
            return
        self._asked_at = min(self._asked_at, time.monotonic())
        self.code = 128 + number
        if self.loud and self.deferred:
            name = signal.Signals(number).name
            _say(
                f"{name}: the update is finished and saved, then the run ends. Ctrl-C ends it at once, without saving."
            )

    @property
    def waiting_s(self) -> float:
        """Seconds since the request; 0 without one."""
        return max(0.0, time.monotonic() - self._asked_at)

    def count(self, number: int) -> None:
        """Count the signals as they arrive: Ctrl-C after another one ends the process, and so does any while it is stuck."""
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            if not self.deferred:  # as while it waits for other ranks to join
                timer = threading.Timer(STUCK_S, lambda: self._end_if_stuck(now, number))
                timer.daemon = True
                timer.start()
        elif number == signal.SIGINT and now - self._first_at > _SAME_S:
            self.end_now(128 + number)

    def _end_if_stuck(self, since: float, number: int) -> None:
        if self._first_at == since and self.code < 128:
            self.end_now(128 + number)

    def end_now(self, code: int) -> None:
        """End this process and its loading processes at once; partial files are removed."""
        if self._ending:
            return
        self._ending = True
        if self.loud:
            _say("Ended at once; what was not saved is lost.")
        for child in multiprocessing.active_children():  # on Linux all others end with this process (end_with_parent)
            child.kill()
        with suppress(Exception):
            self.before_exit(code)
        remove_unfinished()
        os._exit(code)


STOP = StopRequest()


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Listen to SIGNALS inside the block; one that is ignored (as under nohup) stays ignored.

    A handler in Python waits while the process is inside a call of a library, such as an exchange that never ends. So a
    thread listens too, which the interpreter wakes at once.
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
    heard = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    reader, writer = os.pipe()
    if hasattr(os, "set_blocking"):  # Windows: from Python 3.12 on
        os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader,), name="stop requests", daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in heard:
        signal.signal(number, handle)
    try:
        yield STOP
    finally:
        for number in heard:
            signal.signal(number, before[number])
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        thread.join()
        STOP.reset()  # what comes next in this process was not asked to stop


def _watch(reader: int) -> None:
    with os.fdopen(reader, "rb", buffering=0) as stream:
        while numbers := stream.read(64):
            for number in numbers:
                if number in SIGNALS:
                    STOP.count(number)


def ignore_in_worker(worker: int = 0) -> None:
    """Keep a loading process at work when a whole process group is signalled, and end it with its parent.

    Training needs its next batch to stop cleanly.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(KILL)


def end_with_parent(number: int) -> None:
    """Have the kernel send signal `number` to this process when the one that started it is gone. Linux only."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG


def _quiet_child() -> None:
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)  # else signals to a forked process would be taken for the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_quiet_child)


def _say(text: str) -> None:
    with suppress(OSError):  # not through logging: a handler may interrupt it while it writes
        erase = "\r\x1b[2K" if os.isatty(2) else ""  # a progress bar in that line
        os.write(2, f"{erase}{text}\n".encode())
