"""Set up logging: the terminal of the first process, and a file in the run's folder."""

import logging
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path

# Harmless and not ours to mend; everything else is left alone.
_SILENCED = (
    r".*does not have many workers which may be a bottleneck.*",  # num_workers is the user's choice
    r".*This DataLoader will create .* worker processes.*",  # so is this
    r".*ended before the epoch ended and your dataloader is not resumable.*",  # it goes on where `on_train_start` says
    r".*module\(s\) in eval mode at the start of training.*",  # the frozen networks are meant to be
    r".*You have overridden `(on_before_batch_transfer|transfer_batch_to_device)` in `LightningModule`.*",  # on purpose
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*Total length of `list` across ranks is zero.*",  # nothing is held out, as the log says
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*is not currently supported on CUDA-enabled.*pin_memory.*",
    r".*'pin_memory' argument is set as true but no accelerator is found.*",
    r".*Grad strides do not match bucket view strides.*",
    r".*`broadcast_buffers` is deprecated.*",  # its successor is not in the oldest torch that we support
    r".*barrier\(\): using the device under current context.*",
    r".*Using ModelCheckpoint with manual optimization and every_n_train_steps.*",  # after an update is what we want
    r".*The `srun` command is available on your system but is not used.*",
)
# Lightning's loggers bring handlers of their own, and their news (device tables, tips) stand in our start-up table.
_LIGHTNING = ("pytorch_lightning", "lightning_fabric", "lightning", "lightning.pytorch", "lightning.fabric")
_QUIET = ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "matplotlib", "datasets", "huggingface_hub")


class WarningCollector(logging.Handler):
    """Keeps the warnings of a run for its record, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().strip()
        if message not in self.messages and len(self.messages) < 200:
            self.messages.append(message)


class LineFormatter(logging.Formatter):
    """Indents the further lines of an entry, so that no text in it, such as a file's name, passes for an entry."""

    def format(self, record: logging.LogRecord) -> str:
        text = re.sub(r"[\r\x0b\x0c\x1b\x85\u2028\u2029]", "?", super().format(record))
        return re.sub(r"\n(?=\S)", "\n  ", text)


class Terminal(logging.StreamHandler):
    """Writes to what stderr is at the time, so that entries stand above a progress bar, which stands in for stderr.

    Leaves out entries with `extra={"file_only": True}`: figures that a bar shows.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "file_only", False):
            self.stream = sys.stderr
            super().emit(record)


def _warning(message: Warning | str, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """Return a library's warning with the name of the library instead of the place of its file."""
    library = re.search(r"site-packages[\\/](\w+)", filename)
    return f"{library[1] if library else f'{filename}:{lineno}'}: {message}"


def set_up(folder: Path | None, main: bool) -> WarningCollector:
    """Log to the terminal and to FOLDER/run.log from the first process; from the others log errors only."""
    root, collector = logging.getLogger(), WarningCollector()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        if isinstance(handler, logging.FileHandler):
            with suppress(OSError):  # of a disk that is full
                handler.close()
    root.setLevel(logging.INFO)
    terminal = Terminal(sys.stderr)
    terminal.setFormatter(LineFormatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    terminal.setLevel(logging.INFO if main else logging.ERROR)
    root.addHandler(terminal)
    root.addHandler(collector)
    if folder is not None and main:
        file = logging.FileHandler(folder / "run.log", encoding="utf-8")
        file.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        file.handleError = lambda record: None  # type: ignore[method-assign]  # on a full disk a checkpoint says so
        root.addHandler(file)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # reports unused weights, which our strict load looks at
    for name in (*_LIGHTNING, *_QUIET):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _LIGHTNING:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.captureWarnings(True)
    warnings.formatwarning = _warning
    for message in _SILENCED:
        warnings.filterwarnings("ignore", message=message)
    return collector
