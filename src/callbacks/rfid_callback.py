"""Reconstruction FID while training. Protocol: docs/evaluation.md; the pass itself is that of `src/evaluation`."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from src.callbacks.progress import training_paused
from src.core.distributed import Process
from src.core.errors import UserError
from src.core.files import disk_message
from src.core.images import Quantization
from src.core.run_names import run_id
from src.core.weights import resolve
from src.evaluation.image_pairs import KeptPairs, save_pairs
from src.evaluation.networks import load_inception
from src.evaluation.scoring_pass import score_images
from src.metrics.fid import Moments
from src.metrics.inception import InceptionFeatures, InceptionWeights
from src.metrics.reconstruction import ReconstructionScore
from src.metrics.reference import Preparation, load_reference

log = logging.getLogger(__name__)

OFF = "callbacks.rfid.rfid_every_n_steps=0 callbacks.rfid.rfid_every_epoch=false"
REMEDY = (
    f"To train without rFID: {OFF}. For a try-out: callbacks.rfid.inception_weights=untrained (the score is then "
    "called rfid_untrained/score)."
)


@dataclass(eq=False)
class RFIDCallback(pl.Callback):
    """Scores the EMA weights on held-out images; every process takes its share. Arguments: configs/callbacks/rfid.yaml.

    Logs `rfid/{score,psnr,ssim,lpips,images,seconds}`; with untrained Inception weights the first part of the names is
    `rfid_untrained`; for the whole evaluation set at the end `_full` is added to it. Of several sets (`data.evaluation`) the
    first has these names, `rfid_NAME` are the others. Training loses nothing but time.
    """

    rfid_every_n_steps: int
    rfid_every_epoch: bool
    rfid_num_samples: int
    rfid_batch_size: int
    rfid_device: str
    rfid_output_dir: str
    rfid_save_samples: bool
    save_samples_count: int
    use_train_dataloader: bool
    full_at_end: bool
    quantization: Quantization
    inception_path: str | None
    inception_weights: InceptionWeights
    inception_width: float | None = None
    """In the configurations of older runs: below 1 it makes untrained weights tiny."""

    def __post_init__(self) -> None:
        least = {"rfid_every_n_steps": 0, "rfid_num_samples": 2, "rfid_batch_size": 1, "save_samples_count": 0}
        for key, smallest in least.items():
            value = getattr(self, key)
            if not isinstance(value, int) or value < smallest:
                raise UserError(f"callbacks.rfid.{key}={value}: expected a whole number of at least {smallest}.")
        for key, known in {
            "quantization": get_args(Quantization),
            "inception_weights": get_args(InceptionWeights),
        }.items():
            if getattr(self, key) not in known:
                raise UserError(f"callbacks.rfid.{key}={getattr(self, key)}: expected {' or '.join(known)}.")
        self._device = _parse_device(self.rfid_device)
        self._pairs = self.save_samples_count if self.rfid_save_samples else 0
        self.group = "rfid" if self.inception_weights == "pretrained" else "rfid_untrained"
        """First part of the logged names."""
        self._inception: InceptionFeatures | None = None
        self._reals: dict[tuple[str | None, int], Moments] = {}  # by set and number of images: the same ones each time
        self._latest: tuple[int, int, dict[str, float]] = (-1, 0, {})  # step, images wanted, result
        self._warned_of_few = False

    @property
    def scores_checkpoints(self) -> bool:
        """Whether there are scores during training that `best.ckpt` can follow."""
        return bool(self.rfid_every_n_steps) or self.rfid_every_epoch

    @property
    def monitor(self) -> str:
        return f"{self.group}/score"

    # -- when

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Check before training what would fail at the first evaluation. Raises UserError."""
        if stage != "fit" or not (self.scores_checkpoints or self.full_at_end):
            return
        dataset, training_images = trainer.datamodule.evaluation_dataset(self.use_train_dataloader)
        if len(dataset) < 2:
            raise UserError(
                f"rFID needs at least 2 images, the evaluation data has {len(dataset)}. Hold out more "
                f"(data.train_split), or switch it off: {OFF}."
            )
        if training_images:
            log.warning(
                "rFID is measured on training images: nothing is held out (data.train_split, data.hf_validation_split)."
            )
        key = "callbacks.rfid.inception_path"
        self._inception = load_inception(self.inception_path, self.inception_weights, key, REMEDY, self.inception_width)
        if self._pairs and trainer.is_global_zero:
            try:
                self._folder(trainer).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"callbacks.rfid.rfid_output_dir={self.rfid_output_dir}: {error}. Set it to a place that can be "
                    "written, or callbacks.rfid.rfid_save_samples=false."
                ) from error

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        accumulate = pl_module.settings.loop.accumulate_grad_batches
        every = self.rfid_every_n_steps
        if not every or (batch_idx + 1) % accumulate or trainer.global_step % every:
            return
        if self.rfid_every_epoch and batch_idx + 1 >= pl_module.steps_per_epoch * accumulate:
            return  # the end of the epoch does it
        self._evaluate(trainer, pl_module, f"step_{trainer.global_step:07d}", self.rfid_num_samples)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.rfid_every_epoch and self._latest[0] != trainer.global_step:
            self._evaluate(trainer, pl_module, f"epoch_{trainer.current_epoch + 1:03d}", self.rfid_num_samples)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.full_at_end:
            self._evaluate(trainer, pl_module, "end", None, f"{self.group}_full")

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._inception = None
        self._reals.clear()

    # -- what

    def _evaluate(
        self, trainer: pl.Trainer, pl_module: Any, name: str, images: int | None, group: str | None = None
    ) -> None:
        """Score `images` (None: all) and log the figures; pictures go into the folder `name`."""
        group, sets = group or self.group, trainer.datamodule.evaluation_sets
        for number, which in enumerate(sets or [""]):
            start, chosen = time.perf_counter(), which or None
            settings = sets[which].settings if sets else None
            available = len(trainer.datamodule.evaluation_dataset(self.use_train_dataloader, name=chosen)[0])
            wanted = images and settings.num_samples if settings and settings.num_samples else images
            count = min(wanted or available, available)
            with training_paused(trainer):
                if not number and self._latest[:2] == (trainer.global_step, count):
                    values = self._latest[2]  # the same images through the same weights
                else:
                    folder = f"{name}_{which}" if number else name
                    with _evaluation_mode(pl_module.rae, pl_module.ema_decoder):
                        values = self._score(trainer, pl_module, folder, count, chosen)
                    if not number:
                        self._latest = (trainer.global_step, count, values)
                figures = {**values, "seconds": time.perf_counter() - start}
                self._publish(trainer, pl_module, f"{group}_{which}" if number else group, figures)

    def _score(
        self, trainer: pl.Trainer, pl_module: Any, name: str, images: int, which: str | None
    ) -> dict[str, float]:
        """Score the EMA weights on all ranks, with the same result on all of them. which: the evaluation set."""
        process = Process(pl_module.device, trainer.global_rank, trainer.world_size)
        score = ReconstructionScore(
            self._network(pl_module.device), self.rfid_batch_size, pl_module.lpips, self.quantization,
            self._reals.get((which, images)) or self._given(trainer, which, process),
        )  # fmt: skip
        loader = trainer.datamodule.evaluation_loader(
            self.rfid_batch_size, images, process.rank, process.world, self.use_train_dataloader, name=which
        )
        pairs = KeptPairs(self._pairs)

        def reconstruct(batch: Tensor, rows: Tensor) -> list[Tensor]:
            with trainer.precision_plugin.forward_context():
                return [pl_module.reconstruct(batch, "ema")]

        score_images(loader, reconstruct, [score], process, [pairs] if self._pairs else [])
        score.reduce()
        if score.count < 2:  # on all ranks, so that none waits for the others
            raise UserError(f"rFID needs at least 2 images that can be decoded, got {score.count}.")
        self._reals[which, images] = score.reference
        values = score.compute(warn_of_few=not self._warned_of_few) if process.main else {}
        self._warned_of_few = True
        values = dict(trainer.strategy.broadcast(values))
        values = {key.removesuffix("_untrained").replace("rfid", "score"): value for key, value in values.items()}
        kept = pairs.gather() if self._pairs else []
        if kept:
            try:
                save_pairs(kept, self._folder(trainer) / name)
            except OSError as error:
                log.warning("The pictures in %s", disk_message(error, self._folder(trainer) / name))
        return values

    def _given(self, trainer: pl.Trainer, which: str | None, process: Process) -> Moments | None:
        """Read the reference that `data.evaluation` names for a set; None: its originals are the reference."""
        settings = trainer.datamodule.evaluation_sets[which].settings if which else None
        if settings is None or settings.reference is None:
            return None
        size = trainer.datamodule.evaluation_transform.image_size
        remedy = f"Give another file as data.evaluation.{which}.reference, or null for the originals."
        network = self._network(process.device)
        file = resolve(settings.reference)
        return load_reference(file, network, self.rfid_batch_size, Preparation(image_size=size), remedy, process)

    def _publish(self, trainer: pl.Trainer, pl_module: Any, group: str, figures: dict[str, float]) -> None:
        values = {f"{group}/{key}": value for key, value in figures.items()}
        pl_module.scores |= {key: (trainer.global_step, value) for key, value in values.items()}
        pl_module.write_metrics(values)
        if trainer.is_global_zero:
            rest = ", ".join(f"{key.upper()} {figures[key]:.4g}" for key in ("psnr", "ssim", "lpips") if key in figures)
            log.info(
                "step %d, %s: %.4f over %s images (%s) in %.1f s", trainer.global_step, group, figures["score"],
                f"{figures['images']:,}", rest, figures["seconds"],
            )  # fmt: skip

    def _network(self, module_device: torch.device) -> InceptionFeatures:
        """Return it on `rfid_device`: `cuda` is the module's own GPU, or the module's device where there is none."""
        assert self._inception is not None, "setup has not run"
        device = self._device
        if device.type == "cuda" and not torch.cuda.is_available():
            log.warning(
                "callbacks.rfid.rfid_device=%s, but no CUDA device is visible: rFID runs on %s.", device, module_device
            )
            device = self._device = module_device
        if device.type == module_device.type and device.index is None:
            device = module_device
        return self._inception.to(device)

    def _folder(self, trainer: pl.Trainer) -> Path:
        return resolve(self.rfid_output_dir) / run_id(Path(trainer.default_root_dir))


def _parse_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"callbacks.rfid.rfid_device={name}: expected cuda, cuda:N or cpu.")
    return device


@contextmanager
def _evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Put every part in eval mode and give its own mode back afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
