"""How fast a run is, what it waits for, and how long it will take."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch

log = logging.getLogger(__name__)

BOTTLENECK_SHARE = 0.2
"""Share of waiting for data from which a run is told so."""
_SETTLED_STEPS = 20  # before that, start-up and compilation would be called a bottleneck


class Throughput(pl.Callback):
    """Measures between two log entries; writes `perf/…` and keeps the latest figures in `figures`.

    Clocks of the host only: nothing waits for the device. Evaluation, pictures and saving are left out of the time.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        """images_per_s (all processes), data_wait (share of time), memory_gb (peak of this device), seconds_left."""
        self._started = self._mark = 0.0
        self._waited = self._paused = 0.0
        self._images = self._steps = 0
        self._warned = False
        self._total_images, self._total_seconds = 0, 0.0

    @property
    def mean_images_per_s(self) -> float:
        """Over the whole run, the first interval left out where there are others."""
        return (
            self._total_images / self._total_seconds if self._total_seconds else self.figures.get("images_per_s", 0.0)
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._first_step = trainer.global_step
        self._reset()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._waited += time.perf_counter() - self._mark

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loop = pl_module.settings.loop
        self._images += len(batch["image"]) * trainer.world_size
        if (batch_idx + 1) % loop.accumulate_grad_batches == 0:
            self._steps += 1
            if trainer.global_step % loop.log_every_n_steps == 0:
                self._publish(trainer, pl_module)
        self._mark = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.go_on()

    def pause(self) -> None:
        """Time from here to `go_on` is not training."""
        self._paused -= time.perf_counter()

    def go_on(self) -> None:
        self._paused += time.perf_counter()
        self._mark = time.perf_counter()

    def _publish(self, trainer: pl.Trainer, pl_module: Any) -> None:
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        remaining = _total_steps(trainer, pl_module) - trainer.global_step
        self.figures = {
            "images_per_s": self._images / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
            "memory_gb": peak_memory_gb(pl_module.device),
            "seconds_left": seconds / max(self._steps, 1) * remaining,
        }
        if trainer.global_step - self._first_step > pl_module.settings.loop.log_every_n_steps:
            self._total_images += self._images
            self._total_seconds += seconds
            self._warn_of_data()
        pl_module.write_metrics(
            {f"perf/{name}": value for name, value in self.figures.items() if name != "seconds_left"}
        )
        self._reset()

    def _warn_of_data(self) -> None:
        if self.figures["data_wait"] > BOTTLENECK_SHARE and self._steps >= _SETTLED_STEPS and not self._warned:
            self._warned = True
            log.warning(
                "The data path is the bottleneck: %.0f %% of the time goes into waiting for batches. Raise data.num_workers, "
                "or convert the data once with `scripts/create_hf_test_data.py --resize_shorter 384`.",
                100 * self.figures["data_wait"],
            )

    def _reset(self) -> None:
        self._started = self._mark = time.perf_counter()
        self._waited = self._paused = 0.0
        self._images = self._steps = 0


@contextmanager
def training_paused(trainer: pl.Trainer) -> Iterator[None]:
    """The time in here is not training's."""
    clocks = [callback for callback in trainer.callbacks if isinstance(callback, Throughput)]
    for clock in clocks:
        clock.pause()
    try:
        yield
    finally:
        for clock in clocks:
            clock.go_on()


def _total_steps(trainer: pl.Trainer, pl_module: Any) -> int:
    by_epochs = (trainer.max_epochs or 0) * pl_module.steps_per_epoch
    return (
        min(by_epochs, trainer.max_steps)
        if trainer.max_steps > 0 and by_epochs > 0
        else max(by_epochs, trainer.max_steps)
    )


def peak_memory_gb(device: torch.device) -> float:
    """Peak of the GPU's allocations, or of the process on a CPU, in GB (1e9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
