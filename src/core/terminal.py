"""How the command line programs run and what they show meanwhile, all of it on stderr. No heavy imports."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""(batches, their number, a name) -> the same batches."""


@contextmanager
def progress(shown: bool) -> Iterator[Track]:
    """Passes batches through and shows a bar for them."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        yield lambda batches, count, name: bar.track(batches, total=count, description=name)


def log_to_stderr(main: bool) -> None:
    """The first process tells everything of ours, others errors only."""
    warnings.filterwarnings(
        "ignore", message=".*This DataLoader will create .* worker processes.*"
    )  # the user's choice
    logging.basicConfig(level=logging.WARNING if main else logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("src").setLevel(logging.INFO if main else logging.ERROR)


def run_program(body: Callable[[], int]) -> int:
    """The exit status of a command line program: `body`'s own, 1 and one message for the user's mistakes, 130 for Ctrl-C."""
    from src.core.errors import UserError

    rank = int(os.environ.get("RANK", "0"))
    log_to_stderr(rank == 0)
    try:
        return body()
    except UserError as error:
        print(f"Error{f' (process {rank})' if rank else ''}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `PROGRAM | head`
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
