"""Draw sample images with the EMA weights: originals above reconstructions, or samples of fixed noise and classes (stage 2)."""

import logging
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from src.callbacks.progress import training_paused
from src.core.files import disk_message
from src.core.images import save_png, sheet
from src.core.settings import checked

log = logging.getLogger(__name__)


@checked("callbacks.samples")
class SampleImages(pl.Callback):
    """Writes RUN/samples/step_XXXXXXX.png, and to the loggers, every `model.sample_every` updates and at the end."""

    def __init__(self, count: Annotated[int, Field(ge=0)]) -> None:
        """`count`: number of images, the first of the evaluation set, or of the training set if there is none; 0: off."""
        self.count = count
        self.last_file: Path | None = None
        self._originals: Tensor | None = None  # uint8 N 3 H W
        self._drawn_at = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, every = trainer.global_step, pl_module.settings.sample_every
        if every and step % every == 0 and step != self._drawn_at:
            with training_paused(trainer):
                self.draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._drawn_at != trainer.global_step:
            self.draw(trainer, pl_module)

    @torch.no_grad()
    def draw(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._drawn_at = trainer.global_step
        if not trainer.is_global_zero or not self.count:
            return
        if self._originals is None:
            data = trainer.datamodule
            dataset = data.evaluation_dataset(data.evaluation_set(or_training=True), self.count)
            items = (dataset[i] for i in range(len(dataset)))
            images = [item.image for item in items if item.image is not None]
            if not images:
                log.warning("No sample images: none of the first %d evaluation images can be decoded.", self.count)
                self.count = 0
                return
            self._originals = torch.stack(images).to(pl_module.device)
        with trainer.precision_plugin.forward_context():
            picture = sheet(pl_module.sample_rows(self._originals))
        file = Path(trainer.default_root_dir) / "samples" / f"step_{trainer.global_step:07d}.png"
        try:
            save_png(picture, file)
            self.last_file = file
        except OSError as error:
            log.warning("The sample image %s", disk_message(error, file))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", picture, trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_image("samples", [picture.permute(1, 2, 0).numpy()], step=trainer.global_step)
