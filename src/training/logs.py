"""Set up logging on rank 0: to the terminal and to a file in the run folder."""

import logging
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path

# Warnings that are harmless here and not ours to fix; all others are shown.
_SILENCED = (
    r".*does not have many workers which may be a bottleneck.*",  # num_workers is the user's choice
    r".*This DataLoader will create .* worker processes.*",  # the user's choice too
    r".*ended before the epoch ended and your dataloader is not resumable.*",  # resumed by `on_train_start`
    r".*module\(s\) in eval mode at the start of training.*",  # intended: frozen networks
    r".*You have overridden `(on_before_batch_transfer|transfer_batch_to_device)` in `LightningModule`.*",  # intended
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*Total length of `list` across ranks is zero.*",  # nothing is held out, as the log says
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*is not currently supported on CUDA-enabled.*pin_memory.*",
    r".*'pin_memory' argument is set as true but no accelerator is found.*",
    r".*Grad strides do not match bucket view strides.*",
    r".*`broadcast_buffers` is deprecated.*",  # the replacement is missing in the oldest supported torch
    r".*barrier\(\): using the device under current context.*",
    r".*Using ModelCheckpoint with manual optimization and every_n_train_steps.*",  # intended: after an update
    r".*The `srun` command is available on your system but is not used.*",
)
# Lightning's loggers have their own handlers; what they report (device tables, tips) is in our start-up table.
_LIGHTNING = ("pytorch_lightning", "lightning_fabric", "lightning", "lightning.pytorch", "lightning.fabric")
_QUIET = ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "matplotlib", "datasets", "huggingface_hub")


class WarningCollector(logging.Handler):
    """Collects the distinct warnings of a run for its record."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().strip()
        if message not in self.messages and len(self.messages) < 200:
            self.messages.append(message)


class LineFormatter(logging.Formatter):
    """Indents continuation lines, so that text in an entry, such as a file name, cannot look like another entry."""

    def format(self, record: logging.LogRecord) -> str:
        text = re.sub(r"[\r\x0b\x0c\x1b\x85\u2028\u2029]", "?", super().format(record))
        return re.sub(r"\n(?=\S)", "\n  ", text)


class Terminal(logging.StreamHandler):
    """Writes to the current `sys.stderr`, which a progress bar replaces, so that entries appear above the bar.

    Skips entries with `extra={"file_only": True}`: metrics that the bar shows.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "file_only", False):
            self.stream = sys.stderr
            super().emit(record)


def _warning(message: Warning | str, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """Format a warning with the name of its library instead of a file path."""
    library = re.search(r"site-packages[\\/](\w+)", filename)
    return f"{library[1] if library else f'{filename}:{lineno}'}: {message}"


def set_up(folder: Path | None, main: bool) -> WarningCollector:
    """Log to the terminal and FOLDER/run.log on rank 0 (`main`); other ranks log only errors, to the terminal."""
    root, collector = logging.getLogger(), WarningCollector()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        if isinstance(handler, logging.FileHandler):
            with suppress(OSError):  # disk full
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
        file.handleError = lambda record: None  # type: ignore[method-assign]  # a failing checkpoint reports a full disk
        root.addHandler(file)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # reports unused weights, which our strict loading checks
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
