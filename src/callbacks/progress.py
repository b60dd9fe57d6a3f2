"""What a run tells while it goes: the loggers' training figures, a line in the log, a bar on a terminal."""

import logging
import sys
from typing import Any

import pytorch_lightning as pl
import torch
from rich.progress import Progress, TextColumn

from src.callbacks.throughput import Throughput
from src.core.distributed import mean_over_ranks
from src.core.terminal import progress_bar

log = logging.getLogger(__name__)


class TrainingProgress(pl.Callback):
    """Once every `trainer.log_every_n_steps` updates the host waits for the device here, and nowhere else in training."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        """Training figures of the last log entry by their logged names."""
        self._bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = progress_bar(TextColumn("{task.fields[figures]}"))
            self._bar.start()
            self._task = self._bar.add_task("epoch", total=pl_module.steps_per_epoch, figures="")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loop = pl_module.settings.loop
        if (batch_idx + 1) % loop.accumulate_grad_batches:
            return
        step = trainer.global_step
        if pl_module.device.type == "cpu":
            pl_module.check_numbers()  # costs nothing there
        due = step % loop.log_every_n_steps == 0
        if due:
            self._publish(trainer, pl_module)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=(batch_idx + 1) // loop.accumulate_grad_batches,
                description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
                **({"figures": self._short(trainer)} if due else {}),
            )  # fmt: skip
        elif due and trainer.is_global_zero:
            log.info(
                "epoch %d/%s step %d: %s", trainer.current_epoch + 1, trainer.max_epochs, step, self._line(trainer)
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            values = {name: value for name, (_, value) in pl_module.scores.items() if name.startswith("val/")}
            log.info(
                "step %d, validation: %s",
                trainer.global_step,
                ", ".join(f"{name[4:]} {value:.4g}" for name, value in values.items()),
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _publish(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.check_numbers()
        names = sorted(pl_module.train_terms)
        means = mean_over_ranks(torch.stack([pl_module.train_terms[name].float() for name in names]))
        self.latest = dict(zip(names, means.tolist(), strict=True))
        rates = {f"lr/{name}": lr for name, lr in pl_module.learning_rates(trainer.global_step - 1).items()}
        skipped = {"train/skipped_steps": float(pl_module.guard.skipped)} if pl_module.guard.max_skipped_steps else {}
        pl_module.write_metrics({**self.latest, **rates, **skipped})

    def _line(self, trainer: pl.Trainer) -> str:
        shown = {
            name.removeprefix("train/"): value
            for name, value in self.latest.items()
            if name.startswith(("train/", "disc/loss"))
        }
        text = " ".join(f"{name} {value:.4g}" for name, value in shown.items())
        figures = next((c.figures for c in trainer.callbacks if isinstance(c, Throughput)), {})
        if figures:
            text += (
                f" | {figures['images_per_s']:.4g} images/s, {100 * figures['data_wait']:.0f} % waiting for data, "
                f"{figures['memory_gb']:.1f} GB, {duration(figures['seconds_left'])} left"
            )
        return text

    def _short(self, trainer: pl.Trainer) -> str:
        """What fits beside a bar."""
        figures = next((c.figures for c in trainer.callbacks if isinstance(c, Throughput)), {})
        speed = f", {figures['images_per_s']:.4g} images/s, {duration(figures['seconds_left'])} left" if figures else ""
        return f"loss {self.latest['train/loss']:.4g}{speed}"

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """90 -> `2 min`, 9000 -> `2 h 30 min`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
