"""Write `last.ckpt`, `best.ckpt` and `epoch_XXX.ckpt`, from which a run resumes exactly.

Each save writes one file, `last.ckpt`; `best.ckpt` and `epoch_XXX.ckpt` are hard links to it.
"""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
from pydantic import Field
from pytorch_lightning.plugins.io import CheckpointIO

from src.callbacks.progress import training_paused
from src.core.distributed import RankRequests, command_to_resume, require_same_step
from src.core.errors import UserError
from src.core.files import disk_message, link_or_copy, write_torch
from src.core.nonfinite import FIRST_STEP, REMEDY, NonFiniteError, nonfinite_tensors
from src.core.settings import checked
from src.core.stopping import FAILED, STOP, signal_name
from src.core.weights import check_finite, read
from src.formats.checkpoint import check_resumable

log = logging.getLogger(__name__)


CHECKED = ("state_dict", "optimizer_states")
"""Parts of a checkpoint that must be finite, when saved and when loaded."""


@checked("callbacks.checkpoint")
class RunCheckpoint(pl.callbacks.Checkpoint):
    """Saves RUN/checkpoints/last.ckpt every so many steps, minutes and epochs, on a stop request and on an exception."""

    def __init__(
        self,
        every_n_steps: Annotated[int, Field(ge=0)],
        every_n_minutes: Annotated[float, Field(ge=0)],
        every_n_epochs: Annotated[int, Field(ge=0)],
        keep_epochs: Annotated[int, Field(ge=-1)],
    ) -> None:
        """0 disables a trigger. Keeps the `keep_epochs` newest epoch_XXX.ckpt, -1: all. Raises UserError."""
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.every_n_epochs, self.keep_epochs = every_n_epochs, keep_epochs
        self.monitor: str | None = None
        """Logged name that best.ckpt follows, lower is better; None: best.ckpt is the last checkpoint."""
        self.best: float | None = None
        self._restored_monitor: str | None = None
        self._best_step = -1
        self._saved_step: int | None = None  # None: training has not started
        self._saved_at = time.monotonic()
        self._began: int | None = None  # step of the first update in this process
        self._stopped = False
        self._requests = RankRequests()

    # -- schedule

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        STOP.deferred = True
        # Lightning's own check whether another rank got a signal makes the host wait for the device at every batch.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self.monitor = self._choose_monitor(trainer)
        if trainer.ckpt_path and self.best is not None:
            old = Path(trainer.ckpt_path).with_name("best.ckpt")
            if not trainer.strategy.broadcast(old.is_file()):
                log.warning("%s does not exist: best.ckpt starts over.", old)
                self.best = None
            elif trainer.is_global_zero and old.parent != self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
                link_or_copy(old, self.folder / "best.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not pl_module.ends_update(batch_idx):
            return
        self._began = trainer.global_step - 1 if self._began is None else self._began
        late = bool(self.every_n_minutes) and time.monotonic() - self._saved_at > 60 * self.every_n_minutes
        stop, late = self._requests.exchange([STOP.code, late], trainer.world_size)
        if batch_idx + 1 >= pl_module.batches_per_epoch and not stop:
            return  # on_train_epoch_end saves, after the evaluation
        by_steps = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        by_time = late and trainer.global_step > self._saved_step + 1  # else: the request served one step ago
        better = self._is_better(pl_module)
        if stop:
            self._stopped = True
            STOP.code = max(STOP.code, stop)  # if another rank got the signal: the next Ctrl-C counts as the second
        if by_steps or by_time or better or stop:
            self.save(trainer, pl_module)
        if better and trainer.is_global_zero:
            self._link_best(trainer)
        if stop:
            self._end(trainer, stop)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        better = self._is_better(pl_module)
        self.save(trainer, pl_module, force=True)
        epoch = trainer.current_epoch + 1
        if not trainer.is_global_zero:
            return
        if better or self.monitor is None:
            self._link_best(trainer)
        whole = trainer.fit_loop.epoch_loop.batch_progress.current.ready >= pl_module.batches_per_epoch
        if whole and self.every_n_epochs and epoch % self.every_n_epochs == 0:
            link_or_copy(self.folder / "last.ckpt", self.folder / f"epoch_{epoch:03d}.ckpt")
            saved = sorted(self.folder.glob("epoch_*.ckpt"), key=lambda file: (len(file.name), file))  # 1000 after 999
            for file in saved[: max(len(saved) - self.keep_epochs, 0)] if self.keep_epochs >= 0 else []:
                file.unlink()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Link best.ckpt to the last checkpoint if nothing was evaluated."""
        last, best = self.folder / "last.ckpt", self.folder / "best.ckpt"
        if not trainer.is_global_zero or not last.exists() or best.exists():
            return
        if self.monitor in pl_module.scores:
            log.error("%s was never a finite number: there is no best.ckpt, only last.ckpt.", self.monitor)
            return
        link_or_copy(last, best)
        log.info("Nothing was evaluated: best.ckpt is the last checkpoint.")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the state after the last complete update. Single-process runs only: other ranks may no longer respond."""
        if isinstance(exception, (SystemExit, NonFiniteError)) or trainer.world_size > 1 or trainer.sanity_checking:
            return
        if self._began is None or self._stopped:
            return
        done = trainer.fit_loop.epoch_loop.batch_progress.current
        whole = done.ready == done.processed and done.ready % pl_module.settings.accumulate_grad_batches == 0
        if not whole or self._saved_step in (None, trainer.global_step):
            return
        try:
            self.save(trainer, pl_module)
            log.warning("Saved %s at step %d after an error.", self.folder / "last.ckpt", trainer.global_step)
        except Exception as error:  # report the first exception, which may itself be a failed save
            if str(error) != str(exception):
                log.warning("No checkpoint could be saved: %s", error)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        STOP.deferred = False

    def _end(self, trainer: pl.Trainer, code: int) -> None:
        """End the saved run with the exit code that all ranks agreed on. Called on all ranks."""
        where = self.folder / "last.ckpt"
        why = "Stopped" if code == FAILED else signal_name(code)
        log.warning(
            "%s: saved %s at step %d. Resume with:\n%s", why, where, trainer.global_step, command_to_resume(where)
        )
        if code == FAILED and STOP.error is not None:
            raise STOP.error
        # Lightning kills all processes if one that it started exits with a nonzero status.
        raise SystemExit(code if trainer.is_global_zero else 0)

    # -- saving

    def save(self, trainer: pl.Trainer, pl_module: Any, force: bool = False) -> None:
        """Write RUN/checkpoints/last.ckpt, unless already saved after this update (`force`: even then). Called on all ranks."""
        if trainer.global_step == self._saved_step and not force:
            return
        pl_module.check_numbers()
        with training_paused(trainer):
            trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if names := nonfinite_tensors({part: checkpoint[part] for part in CHECKED}):
            last = self.folder / "last.ckpt"
            kept = f"{last} is unchanged" if last.exists() else "There is no earlier checkpoint"
            done = trainer.global_step - (self._began or 0)
            raise NonFiniteError(
                f"Nothing was saved at step {trainer.global_step}: {len(names)} tensor(s) hold NaN or infinity: "
                f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}. {kept}. "
                + (FIRST_STEP if done <= 1 else REMEDY)
            )

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self._restored_monitor = state["best"], state["monitor"]

    # -- best

    def _choose_monitor(self, trainer: pl.Trainer) -> str | None:
        names = [c.monitor for c in trainer.callbacks if getattr(c, "scores_checkpoints", False)]
        validates = trainer.enable_validation and (trainer.val_dataloaders or trainer.datamodule.val_size)
        monitor = names[0] if names else "val/loss" if validates else None
        if monitor is None:
            log.warning("Neither rFID nor validation is on: best.ckpt will be the last checkpoint.")
        if self._restored_monitor not in (None, monitor):
            log.warning("best.ckpt followed %s and now follows %s; it starts over.", self._restored_monitor, monitor)
            self.best = None
        return monitor

    def _is_better(self, pl_module: Any) -> bool:
        """Return whether there is a new score and it is the best so far; record it."""
        step, score = pl_module.scores.get(self.monitor, (-1, math.nan))
        if step <= self._best_step:
            return False
        self._best_step = step
        if not math.isfinite(score):
            log.error(
                "%s is %s at step %d: something is wrong with the weights or the data.", self.monitor, score, step
            )
            return False
        if self.best is not None and score >= self.best:
            return False
        self.best = score
        return True

    def _link_best(self, trainer: pl.Trainer) -> None:
        link_or_copy(self.folder / "last.ckpt", self.folder / "best.ckpt")
        if self.monitor is not None:
            log.info("best.ckpt: %s %.4f at step %d", self.monitor, self.best, self._best_step)


class AtomicCheckpointIO(CheckpointIO):
    """Writes checkpoints atomically, and reads them without executing code from them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:  # a fixed tag: the next run overwrites the partial file (several GB) of a killed one
            write_torch(path, checkpoint, tag="next")
        except OSError as error:
            raise UserError(f"The checkpoint {disk_message(error, path)}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        content = read(path)
        check_resumable(content, path)
        require_same_step(content["global_step"], path)
        remedy = "Resume from an earlier one: best.ckpt, epoch_XXX.ckpt."
        check_finite({part: content.get(part) for part in CHECKED}, path, remedy)
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def make_canonical(loops: dict[str, Any], steps_per_epoch: int, accumulate: int) -> None:
    """Rewrite Lightning's counters in a checkpoint to mean either "k batches of epoch e done" or "e epochs done".

    Lightning's own counters differ between hooks, and one of their states makes the next epoch empty.

    Args:
        loops: loop states of the checkpoint; `fit_loop` is changed in place.
        steps_per_epoch: updates in an epoch. If all are done, the epoch counts as done: it was evaluated before the save,
            or that one evaluation is skipped.
        accumulate: micro-batches in an update; those of an incomplete update are dropped.
    """
    fit = loops["fit_loop"]
    batches, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]
    updates, epoch = batches["current"]["ready"] // accumulate, epochs["current"]["ready"]  # epochs started
    if updates >= steps_per_epoch:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        for part in ("current", "total"):
            epochs[part] = dict.fromkeys(epochs[part], epoch)
    else:
        batches["current"] = dict.fromkeys(batches["current"], updates * accumulate)
        for part in ("current", "total"):
            epochs[part] |= {"ready": epoch, "started": epoch, "processed": epoch - 1, "completed": epoch - 1}
    batches["total"] = dict.fromkeys(batches["total"], batches["total"]["ready"])
    batches["is_last_batch"] = False
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = batches["total"]["ready"]
