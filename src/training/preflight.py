"""Before days of training: does everything fit, and how long will it take? Saves nothing, leaves no folder."""

import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch

from src.callbacks.progress import duration
from src.callbacks.rfid_callback import REMEDY
from src.callbacks.startup import describe, warn
from src.callbacks.throughput import peak_memory_gb
from src.core.errors import UserError
from src.core.weights import resolve
from src.evaluation.networks import load_inception
from src.training.module import require_updates
from src.training.stage1_step import Phase

log = logging.getLogger(__name__)

WARM_STEPS, TIMED_STEPS = 2, 3
BYTES = 4  # checkpoints are float32


@dataclass(frozen=True)
class Stretch:
    """A part of the run with the same losses on."""

    name: str
    steps: int
    phase: Phase


class Stopwatch(pl.Callback):
    """Runs a few updates of each stretch, whatever step it is, and times them."""

    def __init__(self, stretches: list[Stretch]) -> None:
        self.stretches = stretches
        self.seconds: dict[str, list[float]] = {s.name: [] for s in stretches}
        self.memory: dict[str, float] = {}
        self._began = 0.0

    @property
    def updates(self) -> int:
        return len(self.stretches) * (WARM_STEPS + TIMED_STEPS)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.phase = lambda step: self._stretch(step).phase

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % pl_module.settings.loop.accumulate_grad_batches == 0:
            self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % pl_module.settings.loop.accumulate_grad_batches:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        pl_module.check_numbers()
        done = trainer.global_step - 1
        name = self._stretch(done).name
        if done % (WARM_STEPS + TIMED_STEPS) >= WARM_STEPS:
            self.seconds[name].append(time.perf_counter() - self._began)
        self.memory[name] = peak_memory_gb(pl_module.device)

    def _stretch(self, step: int) -> Stretch:
        return self.stretches[min(step // (WARM_STEPS + TIMED_STEPS), len(self.stretches) - 1)]


def preflight(run: Any) -> None:
    """Check and time; the report goes to the log. `run` is a `src.training.run.Run` without loggers and callbacks."""
    trainer, module, config = run.trainer, run.module, run.config
    check_disk(config, module)
    check_inception(config)
    trainer.strategy.barrier()
    run.datamodule.setup("fit")
    steps_per_epoch = epoch_steps(run)
    planned = config["trainer"]["max_epochs"] * steps_per_epoch
    if config["trainer"]["max_steps"] > 0:
        planned = min(planned, config["trainer"]["max_steps"])
    watch = Stopwatch(stretches(module, steps_per_epoch, planned))
    trainer.callbacks.append(watch)
    trainer.fit_loop.max_epochs = None
    trainer.fit_loop.epoch_loop.max_steps = watch.updates
    try:
        trainer.fit(module, datamodule=run.datamodule)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Preflight: data.batch_size={run.datamodule.batch_size} does not fit the device's memory. Try half of it with "
            "trainer.accumulate_grad_batches doubled, model.loss_chunk_size=8, or model.activation_checkpointing=true."
        ) from error
    if trainer.is_global_zero:
        report(trainer, module, run, watch, planned)


def epoch_steps(run: Any) -> int:
    limit = run.config["trainer"]["limit_train_batches"]
    batches = run.datamodule.order.batches
    used = min(limit, batches) if isinstance(limit, int) else int(batches * limit)
    require_updates(used, run.module.settings.loop.accumulate_grad_batches)
    return used // run.module.settings.loop.accumulate_grad_batches


def stretches(module: Any, steps_per_epoch: int, planned: int) -> list[Stretch]:
    """The run cut where a loss starts; parts of no length are left out."""
    starts = module.settings.starts.steps(steps_per_epoch)
    borders = sorted({0, planned, *(min(step, planned) for step in starts.values())})
    found = []
    for first, end in zip(borders, borders[1:], strict=False):
        adversarial = module.discriminator is not None
        phase = Phase(
            lpips=module.lpips is not None and first >= starts["lpips"],
            gan=adversarial and first >= starts["gan"],
            disc=adversarial and first >= starts["disc"],
        )
        name = " + ".join(
            ["L1", *(["LPIPS"] if phase.lpips else []), *(["D"] if phase.disc else []), *(["GAN"] if phase.gan else [])]
        )
        found.append(Stretch(name, end - first, phase))
    return found


def check_disk(config: Mapping[str, Any], module: Any) -> None:
    """Raises UserError where checkpoints would not fit."""
    node = (config.get("callbacks") or {}).get("checkpoint")
    if not node or "_target_" not in node:
        return
    trained = [p for p in module.parameters() if p.requires_grad]
    averaged = sum(p.numel() for p in module.ema_decoder.parameters())
    size = BYTES * (3 * sum(p.numel() for p in trained) + averaged)  # weights and two moments, and the average
    files = 3 + max(node["keep_epochs"], 0)  # last, best, the one being written, the kept ones
    folder = resolve(config["paths"]["log_dir"])
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    log.info(
        "Checkpoints: %.1f GB each, up to %.1f GB in all; %.1f GB free at %s",
        size / 1e9,
        files * size / 1e9,
        free / 1e9,
        folder,
    )
    if free < files * size:
        raise UserError(
            f"Preflight: {files} checkpoints of {size / 1e9:.1f} GB need {files * size / 1e9:.1f} GB, but {folder} has "
            f"{free / 1e9:.1f} GB free. Set paths.log_dir elsewhere or lower callbacks.checkpoint.keep_epochs."
        )
    if not os.access(folder, os.W_OK):
        raise UserError(f"Preflight: {folder} can't be written. Set paths.log_dir to another place.")


def check_inception(config: Mapping[str, Any]) -> None:
    """Raises UserError where rFID is on and its network's weights are missing."""
    node = (config.get("callbacks") or {}).get("rfid")
    if not node or "_target_" not in node:
        return
    if node["rfid_every_n_steps"] or node["rfid_every_epoch"] or node["full_at_end"]:
        key = "callbacks.rfid.inception_path"
        width = node.get("inception_width")  # of an older configuration
        load_inception(node["inception_path"], node["inception_weights"], key, REMEDY, width)


def report(trainer: pl.Trainer, module: Any, run: Any, watch: Stopwatch, planned: int) -> None:
    rows = [(name, value) for name, value in describe(trainer, module) if name not in ("folder", "steps")]
    rows.append(("steps", f"{planned:,} in all"))
    batch = run.datamodule.batch_size * trainer.world_size * module.settings.loop.accumulate_grad_batches
    total = 0.0
    for stretch in watch.stretches:
        times = sorted(watch.seconds[stretch.name])
        if not times:
            continue
        each = times[len(times) // 2]
        total += each * stretch.steps
        rows.append((
            stretch.name,
            f"{stretch.steps:,} steps at {each:.3g} s ({batch / each:.4g} images/s, peak {watch.memory[stretch.name]:.1f} GB): "
            f"{duration(each * stretch.steps)}, {each * stretch.steps * trainer.world_size / 3600:.3g} device-hours",
        ))  # fmt: skip
    rows.append(
        ("in all", f"{duration(total)}, {total * trainer.world_size / 3600:.3g} device-hours, evaluation not counted")
    )
    width = max(len(name) for name, _ in rows)
    log.info(
        "Preflight passed; nothing was saved.\n%s", "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
    )
    warn(trainer, module)
