"""Write every logged number to RUN/metrics.csv, whatever other loggers a run has. Format: `src/core/metrics_file.py`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger

from src.core import metrics_file

log = logging.getLogger(__name__)


class MetricsCsv(Logger):
    """Lightning logger on rank 0; logged values survive SIGKILL."""

    name = ""
    version = ""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / metrics_file.NAME
        self._failed, self._step = False, 0
        metrics_file.append(self.file, 0, {})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: hyperparameters are in .hydra/config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append `metrics`. A write error is logged once and does not stop training."""
        self._step = max(self._step, step or 0)  # `self.log` passes one less, which would read as a restart
        try:
            metrics_file.append(self.file, self._step, metrics)
        except OSError as error:
            if not self._failed:
                log.warning("%s can't be written (%s): the report's curves will have gaps.", self.file, error)
            self._failed = True
