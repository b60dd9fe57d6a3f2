"""Compute reconstruction FID during training, with the scoring pass of `src/evaluation`. Protocol: docs/evaluation.md."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field
from torch import Tensor

from src.callbacks.progress import training_paused
from src.callbacks.scores import ScoreCallback, process_of
from src.core.distributed import Process
from src.core.errors import UserError
from src.core.files import disk_message
from src.core.images import Quantization
from src.core.run_names import run_id
from src.core.settings import checked
from src.core.weights import SizedWeights, resolve
from src.data.settings import EvaluationSettings
from src.evaluation.image_pairs import KeptPairs, save_pairs
from src.evaluation.scoring_pass import score_images
from src.metrics.features import FeatureNetwork
from src.metrics.fid import Moments
from src.metrics.generation import load_reference
from src.metrics.reconstruction import ReconstructionScore
from src.metrics.reference import Preparation

log = logging.getLogger(__name__)


@checked("callbacks.rfid")
@dataclass(eq=False)
class RFIDCallback(ScoreCallback):
    """Scores the EMA weights on held-out images, split over all ranks. Arguments: configs/callbacks/rfid.yaml.

    Logs `rfid/{score,psnr,ssim,lpips,images,seconds}`, and `rfid/rfd_NAME` for further feature networks. The prefix is
    `rfid_untrained` with untrained Inception weights, and gets `_full` for the whole evaluation set at the end. With several
    sets (`data.evaluation`) the first has these names, the others `rfid_NAME`. Does not affect training results.
    """

    score = "rfid"
    scored = "images"
    script = "src/eval_rfid.py"
    off = "callbacks.rfid.rfid_every_n_steps=0 callbacks.rfid.rfid_every_epoch=false"

    rfid_every_n_steps: Annotated[int, Field(ge=0)]
    rfid_every_epoch: bool
    rfid_num_samples: Annotated[int, Field(ge=2)]
    rfid_batch_size: Annotated[int, Field(ge=1)]
    rfid_device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$", description="cuda, cuda:N or cpu")]
    rfid_output_dir: str
    rfid_save_samples: bool
    save_samples_count: Annotated[int, Field(ge=0)]
    use_train_dataloader: bool
    full_at_end: bool
    quantization: Quantization
    inception_path: str | None
    inception_weights: SizedWeights
    features: Sequence[str] = ("inception",)
    inception_width: Annotated[float, Field(gt=0)] | None = None
    """Only set by configs of older runs: below 1 it makes untrained weights tiny."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.every_n_steps, self.every_n_epochs = self.rfid_every_n_steps, int(self.rfid_every_epoch)
        self._device = torch.device(self.rfid_device)
        self._pairs = self.save_samples_count if self.rfid_save_samples else 0
        self._reals: dict[tuple[str | None, int], Mapping[str, Moments]] = {}  # by set and number of images
        self._latest: tuple[int, int, dict[str, float]] = (-1, 0, {})  # step, number of images, result
        self._warned_of_few = False

    @property
    def in_use(self) -> bool:
        return self.scores_checkpoints or self.full_at_end

    # -- schedule

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Check before training for anything that would fail at the first evaluation. Raises UserError."""
        if stage != "fit" or not self.in_use:
            return
        if not hasattr(pl_module, "reconstruct"):
            raise UserError(
                "callbacks.rfid scores reconstructions of stage 1, but this model makes none: use callbacks=generation (with early "
                "stopping: callbacks=[generation,early_stopping]), or remove it."
            )
        available = len(trainer.datamodule.evaluation_set(None, self.use_train_dataloader).rows)
        if available < 2:
            raise UserError(
                f"rFID needs at least 2 images, the evaluation data has {available}. Hold out more "
                f"(data.train_split), or switch it off: {self.off}."
            )
        if not trainer.datamodule.evaluation_sets:
            log.warning(
                "rFID is measured on training images: nothing is held out (data.train_split, data.hf_validation_split)."
            )
        self._networks = self.load_networks()
        if self._pairs and trainer.is_global_zero:
            try:
                self._folder(trainer).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"callbacks.rfid.rfid_output_dir={self.rfid_output_dir}: {error}. Set it to a writable "
                    "folder, or set callbacks.rfid.rfid_save_samples=false."
                ) from error

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.full_at_end:
            with self.skipped_if_overdue(trainer):
                self._evaluate(trainer, pl_module, "end", None, f"{self.group}_full")

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._reals.clear()

    # -- evaluation

    def evaluate(self, trainer: pl.Trainer, pl_module: Any, name: str) -> None:
        self._evaluate(trainer, pl_module, name, self.rfid_num_samples, self.group)

    def _evaluate(self, trainer: pl.Trainer, pl_module: Any, name: str, images: int | None, group: str) -> None:
        """Score `images` images (None: all) of each set and log the results; sample images go to the folder `name`."""
        self._scored_at, data = trainer.global_step, trainer.datamodule
        for number, which in enumerate(data.evaluation_sets or [None]):
            start, found = time.perf_counter(), data.evaluation_set(which, self.use_train_dataloader)
            wanted, available = images, len(found.rows)
            if images and found.settings is not None:
                wanted = found.settings.num_samples or images
            count = min(wanted or available, available)
            with training_paused(trainer):
                if not number and self._latest[:2] == (trainer.global_step, count):
                    values = self._latest[2]  # the same images through the same weights
                else:
                    folder = f"{name}_{which}" if number else name
                    values = self._score(trainer, pl_module, folder, count, which)
                    if not number:
                        self._latest = (trainer.global_step, count, values)
                self.publish(trainer, pl_module, f"{group}_{which}" if number else group, values, start)

    def _score(
        self, trainer: pl.Trainer, pl_module: Any, name: str, images: int, which: str | None
    ) -> dict[str, float]:
        """Score the EMA weights on the evaluation set `which`; all ranks take part and get the same result."""
        process, data = process_of(trainer, pl_module), trainer.datamodule
        found = data.evaluation_set(which, self.use_train_dataloader)
        score = ReconstructionScore(
            self._on_device(pl_module.device), self.rfid_batch_size, pl_module.lpips, self.quantization,
            self._reals.get((which, images)) or self._reference_moments(trainer, which, found.settings, process),
        )  # fmt: skip
        loader = data.evaluation_loader(found, self.rfid_batch_size, images, process.rank, process.world)
        pairs = KeptPairs(self._pairs)

        def reconstruct(batch: Tensor, rows: Tensor) -> list[Tensor]:
            with trainer.precision_plugin.forward_context():
                return [pl_module.reconstruct(batch)]

        batches = self.until_overdue(loader, len(loader), process.world)
        score_images(batches, reconstruct, [score], process, [pairs.observe] if self._pairs else [])
        score.reduce()
        if score.count < 2:  # raise on all ranks, so that none waits for the others
            raise UserError(f"rFID needs at least 2 images that can be decoded, got {score.count}.")
        self._reals[which, images] = score.references
        values = score.compute(warn_of_few=not self._warned_of_few) if process.main else {}
        self._warned_of_few = True
        values = self.broadcast_scores(trainer, values)
        kept = pairs.gather() if self._pairs else []
        if kept:
            try:
                save_pairs(kept, self._folder(trainer) / name)
            except OSError as error:
                log.warning("The sample images in %s", disk_message(error, self._folder(trainer) / name))
        return values

    def _reference_moments(
        self, trainer: pl.Trainer, which: str | None, settings: EvaluationSettings | None, process: Process
    ) -> dict[str, Moments]:
        """Load the reference that `data.evaluation` sets for a set; empty if its originals are the reference."""
        if settings is None or settings.reference is None:
            return {}
        size = trainer.datamodule.evaluation_transform.image_size
        remedy = f"Give another file as data.evaluation.{which}.reference, or null for the originals."
        file, wanted, batch = resolve(settings.reference), Preparation(image_size=size), self.rfid_batch_size
        found: dict[str, Moments] = {}
        for network in self._on_device(process.device):
            found[network.space] = load_reference(file, network, batch, wanted, remedy, process, pool_only=True).pool
        return found

    def _on_device(self, module_device: torch.device) -> list[FeatureNetwork]:
        """Return the networks on `rfid_device`: `cuda` is the module's own GPU, or the module's device if there is no GPU."""
        device = self._device
        if device.type == "cuda" and not torch.cuda.is_available():
            log.warning(
                "callbacks.rfid.rfid_device=%s, but no CUDA device is visible: rFID runs on %s.", device, module_device
            )
            device = self._device = module_device
        if device.type == module_device.type and device.index is None:
            device = module_device
        return [network.to(device) for network in self._networks]

    def _folder(self, trainer: pl.Trainer) -> Path:
        return resolve(self.rfid_output_dir) / run_id(Path(trainer.default_root_dir))
