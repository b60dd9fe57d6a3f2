"""Check before a long run that everything fits, and time it. Writes nothing, creates no folder.

Updates and the loader are timed separately: prefetched batches would hide a slow loader in so few updates.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from src.callbacks.progress import describe, peak_memory_gb, planned_steps, warn
from src.callbacks.scores import ScoreCallback
from src.core.errors import UserError
from src.core.text import duration, table
from src.core.weights import resolve

if TYPE_CHECKING:
    from src.training.run import Run

log = logging.getLogger(__name__)

WARM_STEPS, TIMED_STEPS = 2, 3
LOADER_SECONDS, LOADER_BATCHES = 30.0, 20
"""The loader is timed over LOADER_BATCHES batches per worker, at most LOADER_SECONDS."""
BYTES = 4  # checkpoints are float32


@dataclass
class LossPhase:
    """A part of the run with the same losses on, and its measurements."""

    name: str
    steps: int
    phase: Any
    seconds: list[float] = field(default_factory=list)
    """Duration of each timed update."""
    memory_gb: float = 0.0


class Stopwatch(pl.Callback):
    """Runs a few updates of each phase of a run, whatever their step number, and times them."""

    def __init__(self, max_epochs: int, max_steps: int) -> None:
        """Takes the run's limits; those of the trainer are replaced."""
        self.loss_phases: list[LossPhase] = []
        self._limits = max_epochs, max_steps
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.loss_phases = [LossPhase(*part) for part in pl_module.loss_phases(planned_steps(*self._limits, pl_module))]
        trainer.fit_loop.epoch_loop.max_steps = len(self.loss_phases) * (WARM_STEPS + TIMED_STEPS)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % pl_module.settings.accumulate_grad_batches == 0:
            pl_module.phase_override = self._phase_at(trainer.global_step).phase
            self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not pl_module.ends_update(batch_idx):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        pl_module.check_numbers()
        done = trainer.global_step - 1
        phase = self._phase_at(done)
        if done % (WARM_STEPS + TIMED_STEPS) >= WARM_STEPS:
            phase.seconds.append(time.perf_counter() - self._began)
        phase.memory_gb = peak_memory_gb(pl_module.device)

    def _phase_at(self, step: int) -> LossPhase:
        return self.loss_phases[min(step // (WARM_STEPS + TIMED_STEPS), len(self.loss_phases) - 1)]


def preflight(run: "Run") -> None:
    """Check and time a run built with `bare=True`, and log the report. Raises UserError."""
    trainer, module, config = run.trainer, run.module, run.config
    check_disk(config, module)
    for callback in run.callbacks:
        if isinstance(callback, ScoreCallback) and callback.in_use:
            callback.load_networks()  # raises if a file is missing
    trainer.strategy.barrier()
    watch = Stopwatch(config["trainer"]["max_epochs"], config["trainer"]["max_steps"])
    trainer.callbacks.append(watch)
    trainer.fit_loop.max_epochs = -1  # the stopwatch sets the number of steps
    memory = gpu_memory(trainer.strategy.root_device)
    try:
        trainer.fit(module, datamodule=run.datamodule)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Preflight: data.batch_size={run.datamodule.batch_size} does not fit the device's memory. Try half of it with "
            "trainer.accumulate_grad_batches doubled, model.loss_chunk_size=8, or model.activation_checkpointing=true."
            + "".join(f" The device has {text}." for _, text in memory)
        ) from error
    trainer.fit_loop.max_epochs = config["trainer"]["max_epochs"]
    loading = loader_seconds(run.datamodule.train_dataloader(), max(run.datamodule.num_workers, 1))
    run.datamodule.teardown("fit")
    if trainer.is_global_zero:
        rows = [(name, text) for name, text in describe(trainer, module) if name not in ("folder", "steps")]
        forecast = _forecast(run, watch.loss_phases, loading)
        log.info("Preflight passed; nothing was saved.\n%s", table([*rows, *memory, *forecast]))
        warn(trainer, module)


def gpu_memory(device: torch.device) -> list[tuple[str, str]]:
    """Return a (name, text) row: a GPU's memory and how much is in use. Call before the run allocates its own."""
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    text = f"{total / 1e9:.1f} GB, {taken / 1e9:.1f} GB of it used by other processes and this one's CUDA context (about 0.5 GB)"
    return [("GPU memory", text)]


def loader_seconds(loader: Iterable[Any], workers: int) -> float:
    """Return seconds per batch of loading alone, measured over the second half of the timed batches."""
    began = time.perf_counter()
    times: list[float] = []
    for _ in loader:
        times.append(time.perf_counter() - began)
        if len(times) == LOADER_BATCHES * workers or times[-1] > LOADER_SECONDS:
            break
    half = len(times) // 2
    return (times[-1] - times[half - 1]) / (len(times) - half) if half else times[-1]


def check_disk(config: Mapping[str, Any], module: Any) -> None:
    """Raise UserError if the checkpoints would not fit on the disk."""
    node = (config.get("callbacks") or {}).get("checkpoint")
    if not node or "_target_" not in node:
        return
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in module.ema.average.parameters())
    each = BYTES * (3 * trained + averaged) / 1e9  # GB: weights, two moments, EMA
    files = 3 + max(node["keep_epochs"], 0)  # last, best, one being written, kept epochs
    folder = resolve(config["paths"]["log_dir"])
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    log.info("Checkpoints: %.1f GB each, up to %.1f GB in all; %.1f GB free at %s", each, files * each, free, folder)
    if free < files * each:
        raise UserError(
            f"Preflight: {files} checkpoints of {each:.1f} GB need {files * each:.1f} GB, but {folder} has {free:.1f} GB "
            "free. Set paths.log_dir elsewhere or lower callbacks.checkpoint.keep_epochs."
        )
    if not os.access(folder, os.W_OK):
        raise UserError(f"Preflight: {folder} can't be written. Set paths.log_dir to another folder.")


def _forecast(run: "Run", parts: list[LossPhase], loading: float) -> list[tuple[str, str]]:
    """Return (name, text) rows with the time of the loader, each phase and the whole run. loading: seconds per batch."""
    world, accumulate = run.trainer.world_size, run.module.settings.accumulate_grad_batches
    batch = run.datamodule.batch_size * world * accumulate
    rows = [
        ("loader", f"{batch / (loading * accumulate):.4g} images/s by itself"),
        ("steps", f"{sum(part.steps for part in parts):,} in all"),
    ]
    total = 0.0
    for part in parts:
        computing = median(part.seconds)
        each = max(computing, loading * accumulate)
        total += each * part.steps
        waits = f", {computing:.3g} s without waiting for data" if each > computing else ""
        rows.append((
            part.name,
            f"{part.steps:,} steps at {each:.3g} s ({batch / each:.4g} images/s, peak {part.memory_gb:.1f} GB{waits}): "
            f"{duration(each * part.steps)}, {each * part.steps * world / 3600:.3g} device-hours",
        ))  # fmt: skip
    whole = f"{duration(total)}, {total * world / 3600:.3g} device-hours, evaluation not counted"
    return [*rows, ("total", whole)]
