"""Show training progress: start-up table, metrics for the loggers, log line or progress bar, speed and time left."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field
from rich.progress import Progress, TextColumn

from src.core.distributed import mean_over_ranks
from src.core.settings import checked
from src.core.terminal import progress_bar
from src.core.text import duration, table

log = logging.getLogger(__name__)

BOTTLENECK_SHARE = 0.2
"""Share of time spent waiting for data above which a data-loading warning is logged."""
_SETTLED_STEPS = 20  # earlier, start-up and compilation would look like a bottleneck


class StartupTable(pl.Callback):
    """Logs the start-up table and warnings before the first step; sends the run folder to all ranks."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)  # created by rank 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            log.info("This run:\n%s", table(describe(trainer, pl_module)))
            warn(trainer, pl_module)


@checked("callbacks.progress")
class TrainingProgress(pl.Callback):
    """Logs training metrics and speed every `trainer.log_every_n_steps` updates.

    This is the only point in training where the host waits for the device. Speed excludes the time inside
    `training_paused` (evaluation, sample images, saving).
    """

    def __init__(self, peak_tflops: Annotated[float, Field(gt=0)] | None = None) -> None:
        """`peak_tflops`: peak of one device in the precision used, for `perf/mfu`; None: not logged. Raises UserError."""
        self._peak = peak_tflops
        self._flops: float | None = None  # seconds for one image at peak FLOP/s
        self.latest: dict[str, float] = {}
        """Training metrics of the last log entry, by logged name."""
        self.speed: dict[str, float] = {}
        """Since the previous log entry: images_per_s (all ranks), data_wait (share of time in which the device only waited
        for a batch), memory_gb (peak of this device), seconds_left, and mfu (model FLOPs utilisation) if the peak and the
        FLOPs per image are known."""
        self._start = self._paused = 0.0  # seconds
        self._device = torch.device("cpu")
        self._mark = moment(self._device)
        self._waits: list[tuple[Moment, Moment]] = []
        self._images = self._steps = 0
        self._intervals: list[tuple[int, float]] = []  # images and seconds between log entries
        self._warned = False
        self._bar: Progress | None = None

    @property
    def mean_images_per_s(self) -> float:
        """Mean over the run, without the first logging interval if there are others."""
        settled = self._intervals[1:] or self._intervals
        return sum(images for images, _ in settled) / max(sum(seconds for _, seconds in settled), 1e-9)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._peak is not None:
            flops = pl_module.training_flops()
            self._flops = None if flops is None else flops / (self._peak * 1e12)
            if flops is None:
                log.warning("callbacks.progress.peak_tflops has no effect: the FLOPs of this stage are not counted.")
        self._device = pl_module.device
        self._restart_clock()
        others = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in trainer.callbacks)
        if trainer.is_global_zero and sys.stderr.isatty() and not others:
            self._bar = progress_bar(TextColumn("{task.fields[metrics]}"))
            self._bar.start()
            total = planned_steps(trainer.max_epochs, trainer.max_steps, pl_module) or None
            self._task = self._bar.add_task("training", total=total, completed=trainer.global_step, metrics="")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._mark = moment(self._device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._waits.append((self._mark, moment(self._device)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += len(batch["position"]) * trainer.world_size
        if pl_module.ends_update(batch_idx):
            self._steps += 1
            if pl_module.device.type == "cpu":
                pl_module.check_numbers()  # free on the CPU
            due = trainer.global_step % pl_module.settings.log_every_n_steps == 0
            if due:
                self._publish(trainer, pl_module)
            if trainer.is_global_zero:
                self._show(trainer, due)
        self._mark = moment(self._device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.resume()
        if trainer.is_global_zero and not trainer.sanity_checking:
            values = {name: value for name, (_, value) in pl_module.scores.items() if name.startswith("val/")}
            scores = ", ".join(f"{name[4:]} {value:.4g}" for name, value in values.items())
            log.info("step %d, validation: %s", trainer.global_step, scores)

    def pause(self, *_: Any) -> None:
        """Stop the clock until `resume`."""
        self._paused -= time.perf_counter()

    on_validation_start = pause

    def resume(self) -> None:
        self._paused += time.perf_counter()
        self._mark = moment(self._device)

    def _publish(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.check_numbers()
        names = sorted(pl_module.train_terms)
        means = mean_over_ranks(torch.stack([pl_module.train_terms[name].float() for name in names]))
        found = zip(names, means.tolist(), strict=True)
        sparse = pl_module.sparse_terms
        self.latest = {name: value for name, value in found if value == value or not name.startswith(sparse)}
        self._measure(trainer, pl_module)
        rates = {f"lr/{name}": lr for name, lr in pl_module.learning_rates(trainer.global_step - 1).items()}
        counter = pl_module.nonfinite
        skipped = {"train/skipped_steps": float(counter.skipped)} if counter.max_skipped_steps else {}
        speed = {f"perf/{name}": value for name, value in self.speed.items() if name != "seconds_left"}
        pl_module.write_metrics({**self.latest, **rates, **skipped, **speed})

    def _measure(self, trainer: pl.Trainer, pl_module: Any) -> None:
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        planned = planned_steps(trainer.max_epochs, trainer.max_steps, pl_module)
        self.speed = {
            "images_per_s": self._images / seconds,
            "data_wait": min(sum(seconds_between(*wait) for wait in self._waits) / seconds, 1.0),
            "memory_gb": peak_memory_gb(pl_module.device),
            "seconds_left": seconds / self._steps * (planned - trainer.global_step),
        }
        if self._flops is not None:
            self.speed["mfu"] = self.speed["images_per_s"] / trainer.world_size * self._flops
        self._intervals.append((self._images, seconds))
        waits = self.speed["data_wait"] > BOTTLENECK_SHARE and self._steps >= _SETTLED_STEPS
        if waits and len(self._intervals) > 1 and not self._warned:
            self._warned = True
            log.warning(
                "Data loading is the bottleneck: %.0f %% of the time is spent waiting for batches. Raise data.num_workers, "
                "or convert the data once with `scripts/create_hf_test_data.py --resize_shorter 384`.",
                100 * self.speed["data_wait"],
            )
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._start = time.perf_counter()
        self._mark, self._waits, self._paused = moment(self._device), [], 0.0
        self._images = self._steps = 0

    def _show(self, trainer: pl.Trainer, due: bool) -> None:
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, description=epoch)
        if not due:
            return
        rate, left = f"{self.speed['images_per_s']:.4g} images/s", f"{duration(self.speed['seconds_left'])} left"
        if self._bar is not None:
            self._bar.update(self._task, metrics=f"loss {self.latest['train/loss']:.4g}, {rate}, {left}")
        shown = [name for name in self.latest if name.startswith(("train/", "disc/loss"))]
        terms = " ".join(f"{name.removeprefix('train/')} {self.latest[name]:.4g}" for name in shown)
        wait, memory = f"{100 * self.speed['data_wait']:.0f} % waiting for data", f"{self.speed['memory_gb']:.1f} GB"
        log.info(
            "%s step %d: %s | %s, %s, %s, %s", epoch, trainer.global_step, terms, rate, wait, memory, left,
            extra={"file_only": self._bar is not None},
        )  # fmt: skip

    def _stop_bar(self, *_: Any) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with suppress(OSError):  # a terminal that was closed
                bar.stop()

    on_train_end = on_exception = _stop_bar


def planned_steps(max_epochs: int | None, max_steps: int, pl_module: Any) -> int:
    """Return the number of updates after which training ends; 0: no limit."""
    limits = ((max_epochs or 0) * pl_module.steps_per_epoch, max_steps)
    return min((steps for steps in limits if steps > 0), default=0)


Moment = float | torch.cuda.Event
"""Host time in seconds, or a CUDA event: GPU work lags behind the host, so a waiting host does not mean an idle GPU."""


def moment(device: torch.device) -> Moment:
    """Return the current moment, without waiting for the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Moment, second: Moment) -> float:
    """Return the seconds between two moments; CUDA events must have completed."""
    if isinstance(first, float) or isinstance(second, float):
        return second - first  # type: ignore[operator]
    return first.elapsed_time(second) / 1000


@contextmanager
def training_paused(trainer: pl.Trainer) -> Iterator[None]:
    """Exclude the time inside the block from the training speed."""
    clocks = [callback for callback in trainer.callbacks if isinstance(callback, TrainingProgress)]
    for clock in clocks:
        clock.pause()
    try:
        yield
    finally:
        for clock in clocks:
            clock.resume()


def describe(trainer: pl.Trainer, pl_module: Any) -> list[tuple[str, str]]:
    """Return the (name, text) rows of the start-up table."""
    data, settings, published = trainer.datamodule, pl_module.settings, pl_module.published_batch
    batch = data.batch_size * trainer.world_size * settings.accumulate_grad_batches
    factors = f"data.batch_size={data.batch_size} x {trainer.world_size} process(es) x "
    factors += f"trainer.accumulate_grad_batches={settings.accumulate_grad_batches}"
    limit = f", at most {trainer.max_steps:,}" if trainer.max_steps > 0 else ""
    return [
        ("device", f"{trainer.world_size} x {device_name(trainer.strategy.root_device)}"),
        ("precision", str(trainer.precision)),
        *data.describe(),
        ("global batch", f"{batch} images per update ({factors}); published: {published}"),
        *pl_module.startup_rows(),
        ("steps", f"{pl_module.steps_per_epoch:,} updates per epoch, {trainer.max_epochs} epoch(s){limit}"),
        ("seed", str(settings.seed)),
        ("folder", trainer.default_root_dir),
    ]


def warn(trainer: pl.Trainer, pl_module: Any) -> None:
    """Log warnings about likely mistakes: those of the module, no GPU, untrained networks."""
    for text in pl_module.likely_mistakes(trainer.max_epochs):
        log.warning("%s", text)
    untrained = pl_module.untrained_parts()
    if trainer.strategy.root_device.type == "cpu" and "encoder" not in untrained:
        cuda = torch.version.cuda or "none"
        log.warning("No GPU is used (torch is built for CUDA %s). trainer=gpu makes that an error.", cuda)
    if untrained:
        log.warning("UNTRAINED by request: %s. Random weights: not a result.", ", ".join(untrained))


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def peak_memory_gb(device: torch.device) -> float:
    """Return peak memory in GB (1e9 bytes): allocated on the GPU, or of the process on a CPU; 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
