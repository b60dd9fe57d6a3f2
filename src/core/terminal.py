"""Run the command-line scripts: exit codes, error messages and progress, all on stderr. No heavy imports."""

import io
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
Update = Callable[[int, int], None]
"""(done, total)"""
_LINE_EVERY_S = 30.0


def progress_bar(*columns: Any) -> Any:
    """Return a `rich.progress.Progress` on stderr that is erased at the end; `columns` are appended."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    own = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*own, *columns, console=Console(stderr=True, soft_wrap=True), transient=True)


@contextmanager
def progress(what: str, shown: bool = True) -> Iterator[Update]:
    """Yield a function that shows progress: a bar on a terminal, else a line every 30 s. Does nothing unless `shown`."""
    if not (shown and sys.stderr.isatty()):
        yield _line_updates(what) if shown else lambda done, total: None
        return
    from rich.progress import TimeRemainingColumn

    with progress_bar(TimeRemainingColumn()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted(items: Iterable[T], total: int, update: Update) -> Iterator[T]:
    """Yield the items and report their count to `update`, from `progress`."""
    for done, item in enumerate(items):
        update(done, total)
        yield item
    update(total, total)


def run_program(body: Callable[[], int]) -> int:
    """Run a command-line script and return its exit status.

    It is that of `body`, 1 with one message after a user error, 130 after Ctrl-C. SIGTERM and SIGHUP raise SystemExit (143,
    129), so that unfinished files are removed; an ignored signal (nohup) stays ignored.
    """
    from src.core.errors import UserError, lacks_memory
    from src.core.files import DISK_ERRORS

    rank = int(os.environ.get("RANK", "0"))
    warnings.filterwarnings("ignore", message=".*This DataLoader will create .* worker processes.*")
    logging.basicConfig(level=logging.ERROR if rank else logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("src").setLevel(logging.ERROR if rank else logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names that the terminal's encoding lacks
    before = answer_signals(lambda number, frame: sys.exit(128 + number))
    try:
        return body()
    except (UserError, MemoryError, RuntimeError) as error:
        if isinstance(error, UserError):
            text = str(error) if "--config" in sys.argv else in_options(str(error))
        elif lacks_memory(error):
            reason = (str(error).splitlines() or ["for Python objects"])[0].rstrip(".")
            text = f"Not enough memory: {reason}. Use a smaller --batch_size, or fewer images."
        else:
            raise
        print(f"Error{f' (process {rank})' if rank else ''}: {text}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `PROGRAM | head`
        sys.stdout = None
        return 0
    except OSError as error:
        if error.errno not in DISK_ERRORS and (error.filename is None or isinstance(error, FileNotFoundError)):
            raise
        print(
            f"Error: {error.filename or 'a file'}: {error.strerror}. Make room, or give another path.", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answer_signals(handler: Any) -> dict[int, Any]:
    """Set `handler` for SIGTERM and SIGHUP (not on Windows) unless ignored; return the previous handlers by signal number."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


OPTION_OF = {
    "data.data_dir": "--data_dir", "data.image_size": "--image_size", "data.batch_size": "--batch_size", "data.exif": "--exif",
    "data.num_workers": "--num_workers", "data.max_bad_share": "--max_bad_share", "model.encoder_params": "--encoder",
    "model.encoder_cls": "--encoder_cls", "model.normalization_stat_path": "--stats", "model.pretrained_decoder_path": "--decoder",
    "model.decoder_config_path": "--decoder_config", "model.decoder_patch_size": "--decoder_patch_size",
    "model.autoencoder": "--autoencoder", "data.hf_split": "--split",
}  # fmt: skip
"""Keys of the training configuration, and the equivalent options of the other scripts."""


def in_options(text: str) -> str:
    """Replace configuration keys in a message by a script's options: `data.data_dir=X` becomes `--data_dir X`."""
    key = re.compile(rf"\b({'|'.join(map(re.escape, OPTION_OF))})(?![\w.]*\w=)\b(=(?=\S))?")
    return key.sub(lambda found: OPTION_OF[found[1]] + " " * bool(found[2]), text)


def _line_updates(what: str) -> Update:
    started = last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            print(f"{done:,} of {total:,} {what} after {now - started:.0f} s", file=sys.stderr, flush=True)

    return update
