"""Checkpoints: `last.ckpt`, `best.ckpt`, `epoch_XXX.ckpt`, and the exact way back.

One file is written at a time; `best` and `epoch_XXX` are further names (hard links) of it.
"""

import logging
import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from src.callbacks.lightning_counters import make_canonical
from src.callbacks.throughput import training_paused
from src.core.errors import UserError
from src.core.files import link_or_copy
from src.core.launch import Launch
from src.core.nonfinite import NonFiniteError
from src.core.rank_requests import Agreement

log = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM  # 143, what a shell reports of a process that SIGTERM ended


class RunCheckpoint(pl.callbacks.Checkpoint):
    """Saves RUN/checkpoints/last.ckpt by steps, minutes and epochs, at SIGTERM and at an exception."""

    def __init__(self, every_n_steps: int, every_n_minutes: float, every_n_epochs: int, keep_epochs: int) -> None:
        """0 switches a rule off; `keep_epochs` newest epoch_XXX.ckpt stay, -1 keeps all."""
        for key, value in (
            ("every_n_steps", every_n_steps),
            ("every_n_minutes", every_n_minutes),
            ("every_n_epochs", every_n_epochs),
        ):
            if value < 0:
                raise UserError(f"callbacks.checkpoint.{key}={value}: expected 0 (off) or more.")
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.every_n_epochs, self.keep_epochs = every_n_epochs, keep_epochs
        # Asked for now: once Lightning has started its children, its first process looks like one of them.
        self._is_child = Launch.detect().kind == "child"
        self.monitor: str | None = None
        """Logged name that best.ckpt follows, lower is better; None: it is the last one."""
        self.best: float | None = None
        self.resumed_from: Path | None = None
        self._best_step = -1
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._epoch_ended = False
        self._signalled = False
        self._agreement = Agreement()
        self._previous_handler: Any = None

    # -- when

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._previous_handler = signal.signal(
            signal.SIGTERM, self._on_sigterm
        )  # instead of Lightning's, which exits with 0
        # Its own question whether another rank was signalled makes the host wait for the device at every batch.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self.monitor = self._choose_monitor(trainer)
        if self.resumed_from is not None and self.best is not None and trainer.is_global_zero:
            old = self.resumed_from.with_name("best.ckpt")
            if old.is_file() and old.parent != self._folder(trainer):
                self._folder(trainer).mkdir(parents=True, exist_ok=True)
                link_or_copy(old, self._folder(trainer) / "best.ckpt")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._epoch_ended = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % pl_module.settings.loop.accumulate_grad_batches:
            return
        late = bool(self.every_n_minutes) and time.monotonic() - self._saved_at > 60 * self.every_n_minutes
        stop, heard_late = self._agreement.exchange([self._signalled, late], trainer.world_size)
        late = heard_late and trainer.global_step > self._saved_step + 1  # or it is the wish that has just been granted
        if stop:
            self.save(trainer, pl_module)
            where = self._folder(trainer) / "last.ckpt"
            log.warning("SIGTERM: saved %s at step %d. Go on with ckpt_path=%s", where, trainer.global_step, where)
            raise SystemExit(0 if self._is_child else TERMINATED)  # Lightning kills all processes where a child fails
        if batch_idx + 1 >= _batches_per_epoch(pl_module):
            return  # the end of the epoch saves, once its evaluation is over
        by_steps = bool(self.every_n_steps) and trainer.global_step % self.every_n_steps == 0
        better = self._is_better(pl_module)
        if by_steps or better or late:
            self.save(trainer, pl_module)
        if better and trainer.is_global_zero:
            self._name_best(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._epoch_ended = True
        better = self._is_better(pl_module)
        self.save(trainer, pl_module)
        epoch = trainer.current_epoch + 1
        if trainer.is_global_zero:
            if better or self.monitor is None:
                self._name_best(trainer)
            whole = trainer.fit_loop.epoch_loop.batch_progress.current.ready >= _batches_per_epoch(pl_module)
            if whole and self.every_n_epochs and epoch % self.every_n_epochs == 0:
                link_or_copy(self._folder(trainer) / "last.ckpt", self._folder(trainer) / f"epoch_{epoch:03d}.ckpt")
                self._prune(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """A run too short for an evaluation still has a best.ckpt."""
        last, best = (self._folder(trainer) / name for name in ("last.ckpt", "best.ckpt"))
        if trainer.is_global_zero and last.exists() and not best.exists():
            link_or_copy(last, best)
            log.info("Nothing was evaluated: best.ckpt is the last checkpoint.")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The state after the last whole update; on one process only, since others may not answer any more."""
        unfinished = trainer.global_step == self._saved_step or trainer.world_size > 1 or trainer.sanity_checking
        if (
            unfinished
            or isinstance(exception, (SystemExit, NonFiniteError))
            or not self._at_update_boundary(trainer, pl_module)
        ):
            return
        try:
            self.save(trainer, pl_module)
            log.warning(
                "Saved %s at step %d before giving up.", self._folder(trainer) / "last.ckpt", trainer.global_step
            )
        except Exception as error:  # the first exception is the one to show
            log.warning("No checkpoint could be saved: %s", error)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    # -- what

    def save(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """RUN/checkpoints/last.ckpt, whole or not at all. On all ranks."""
        if trainer.global_step == self._saved_step and not self._epoch_ended:
            return
        pl_module.check_numbers()
        with training_paused(trainer):
            trainer.save_checkpoint(self._folder(trainer) / "last.ckpt", weights_only=False)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        make_canonical(checkpoint["loops"], _batches_per_epoch(pl_module))

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = state["best"]
        self._carried_monitor = state["monitor"]

    _carried_monitor: str | None = None

    # -- best

    def _choose_monitor(self, trainer: pl.Trainer) -> str | None:
        names = [c.monitor for c in trainer.callbacks if getattr(c, "scores_checkpoints", False)]
        if names:
            monitor = names[0]
        elif trainer.val_dataloaders or trainer.datamodule.val_size:
            monitor = "val/loss"
        else:
            monitor = None
            log.warning("Neither rFID nor validation is on: best.ckpt will be the last checkpoint.")
        if self._carried_monitor is not None and monitor != self._carried_monitor:
            log.warning("best.ckpt followed %s and now follows %s; it starts afresh.", self._carried_monitor, monitor)
            self.best = None
        return monitor

    def _is_better(self, pl_module: Any) -> bool:
        """Takes note of a score that has not been looked at; True where it is the best so far."""
        step, score = pl_module.scores.get(self.monitor, (-1, float("nan")))
        if step <= self._best_step:
            return False
        self._best_step = step
        if not math.isfinite(score) or (self.best is not None and score >= self.best):
            return False
        self.best = score
        return True

    def _name_best(self, trainer: pl.Trainer) -> None:
        link_or_copy(self._folder(trainer) / "last.ckpt", self._folder(trainer) / "best.ckpt")
        if self.monitor is not None:
            log.info("best.ckpt: %s %.4f at step %d", self.monitor, self.best, self._best_step)

    # -- stopping and time

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        self._signalled = True

    def _at_update_boundary(self, trainer: pl.Trainer, pl_module: Any) -> bool:
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        return (
            progress.ready == progress.processed
            and progress.ready % pl_module.settings.loop.accumulate_grad_batches == 0
        )

    # -- files

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def _prune(self, trainer: pl.Trainer) -> None:
        if self.keep_epochs >= 0:
            saved = sorted(self._folder(trainer).glob("epoch_*.ckpt"))
            for file in saved[: max(len(saved) - self.keep_epochs, 0)]:
                file.unlink()


def _batches_per_epoch(pl_module: Any) -> int:
    return pl_module.steps_per_epoch * pl_module.settings.loop.accumulate_grad_batches
