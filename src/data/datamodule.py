"""The data of a run, from the keys of `configs/data/*.yaml`. The only Lightning in `src/data`."""

import logging
import math
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule

from src.core import weights
from src.core.errors import UserError
from src.data import dummy
from src.data.dataset import EvaluationDataset, EvaluationTransform, TrainCrop, TrainDataset, TrainTransform
from src.data.decode import Decoder, Exif
from src.data.loader import PREFETCH_BATCHES, EvaluationLoader, TrainLoader, WorkerOptions
from src.data.order import EpochOrder, evaluation_rows
from src.data.splits import Splits, open_splits
from src.data.worker_faults import prefetched_batches

log = logging.getLogger(__name__)

REMOVED_KEYS = {"prefetch_factor", "pin_memory", "worker_start", "val_batch_size"}
"""Of run configs written by earlier versions; accepted and without effect."""


class RAEDataModule(LightningDataModule):
    """Training crops and evaluation images. What each argument means stands in `configs/data/imagenet.yaml`.

    Ranks come from the trainer once it is attached, else there is one. Batches: `src.data.dataset.collate`.
    """

    def __init__(
        self,
        data_dir: str,
        use_hf_dataset: bool,
        hf_split: str,
        hf_validation_split: str | None,
        train_split: float,
        label: str | None,
        image_size: int,
        batch_size: int,
        accumulate: int,
        seed: int,
        train_crop: TrainCrop,
        resize_shorter_px: int | None,
        exif: Exif,
        max_megapixels: float,
        max_bad_share: float,
        num_workers: int,
        worker_timeout_s: float = 0,
        **removed: Any,
    ) -> None:
        super().__init__()
        if unknown := removed.keys() - REMOVED_KEYS:
            raise TypeError(f"unexpected keyword argument {', '.join(sorted(unknown))}")
        for key, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("resize_shorter_px", image_size if resize_shorter_px is None else resize_shorter_px, 1),
            ("num_workers", num_workers, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"data.{key}={value}: expected a whole number of at least {least}.")
        if not (isinstance(worker_timeout_s, (int, float)) and 0 <= worker_timeout_s < math.inf):
            raise UserError(f"data.worker_timeout_s={worker_timeout_s}: expected seconds, 0 for no limit.")
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"data.max_bad_share={max_bad_share}: expected a share from 0 to 1.")
        self.data_dir, self.use_hf_dataset, self.train_split = weights.resolve(data_dir), use_hf_dataset, train_split
        self._split_names, self.label = (hf_split, hf_validation_split), label
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.num_workers, self.max_bad_share = num_workers, max_bad_share
        self.worker_timeout_s, self._image_bytes = worker_timeout_s, 3 * image_size**2
        decoder = Decoder(exif, max_megapixels)
        self.train_transform = TrainTransform(image_size, train_crop, resize_shorter_px, decoder, seed)
        self.evaluation_transform = EvaluationTransform(image_size, decoder)
        self._splits: Splits | None = None
        self._persistent: list[TrainLoader | EvaluationLoader] = []

    # -- what is there

    def prepare_data(self) -> None:
        """Make the project's own small data sets where they are asked for and missing."""
        if self.use_hf_dataset:
            dummy.ensure(self.data_dir)

    def setup(self, stage: str | None = None) -> None:
        """Open the data. Raises UserError where there is none."""
        if self._splits is None:
            self._splits = open_splits(
                self.data_dir, self.use_hf_dataset, *self._split_names, self.train_split, self.label
            )
            log.info("Data: %s", self._splits.description)

    def teardown(self, stage: str | None = None) -> None:
        """End the worker processes of the loaders given out."""
        while self._persistent:
            self._persistent.pop().close()

    @property
    def splits(self) -> Splits:
        """Open the data on first use."""
        if self._splits is None:
            self.prepare_data()
            self.setup()
        assert self._splits is not None
        return self._splits

    @property
    def train_size(self) -> int:
        return len(self.splits.train_rows)

    @property
    def val_size(self) -> int:
        """Count the held-out images."""
        return len(self.splits.validation_rows)

    @property
    def num_classes(self) -> int | None:
        """Count the classes of the labels that batches carry as `label`; None where they carry none."""
        return self.splits.train.num_classes

    @property
    def fingerprint(self) -> str:
        """Identify data and division as `HEX-train_rows-validation_rows`; changes with files, not with the seed."""
        source, held_out = self.splits.train, self.splits.validation
        validation = f"+{held_out.fingerprint()}" if held_out is not None and held_out is not source else ""
        return f"{source.fingerprint()}{validation}-{self.train_size}-{self.val_size}"

    # -- training

    @property
    def order(self) -> EpochOrder:
        """Assign images to the batches of this rank. Raises UserError where a global batch can't be filled."""
        world, rank = self._ranks()
        return EpochOrder(self.train_size, self.seed, self.batch_size, world, rank, self.accumulate)

    def train_dataloader(self) -> TrainLoader:
        dataset = TrainDataset(self.splits.train, self.splits.train_rows, self.train_transform)
        loader = TrainLoader(dataset, self.order, self._workers(), self.max_bad_share)
        self._persistent.append(loader)
        return loader

    # -- evaluation

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Load this rank's share of the held-out images; an empty list (no validation) where there are none."""
        if not self.val_size:
            return []
        world, rank = self._ranks()
        return self.evaluation_loader(self.batch_size, None, rank, world, persistent=True)

    def evaluation_dataset(
        self, fallback_to_train: bool, num_images: int | None = None, rank: int = 0, world: int = 1
    ) -> tuple[EvaluationDataset, bool]:
        """Return (images, whether they are training images).

        The held-out images, centre-cropped, in an order that depends on their number alone, mixed over classes; the
        first `num_images`, of those every `world`-th from `rank` on.

        Raises:
            UserError: nothing is held out and `fallback_to_train` is false.
        """
        splits = self.splits
        source, rows, is_train = splits.validation, splits.validation_rows, False
        if source is None:
            if not fallback_to_train:
                raise UserError(
                    f"{self.data_dir} has no validation split and data.train_split={self.train_split:g} holds nothing "
                    "out. Set data.train_split=0.95 (say), name a split with data.hf_validation_split, or evaluate on "
                    "training images with callbacks.rfid.use_train_dataloader=true."
                )
            source, rows, is_train = splits.train, splits.train_rows, True
        chosen: np.ndarray = rows[evaluation_rows(len(rows), num_images, world, rank)]
        return EvaluationDataset(source, chosen, self.evaluation_transform), is_train

    def evaluation_loader(
        self,
        batch_size: int,
        num_images: int | None = None,
        rank: int = 0,
        world: int = 1,
        train_fallback: bool = False,
        persistent: bool = False,
    ) -> EvaluationLoader:
        """Load `evaluation_dataset` in batches. persistent: keep the workers between passes."""
        dataset, _ = self.evaluation_dataset(train_fallback, num_images, rank, world)
        largest_share = len(self.evaluation_dataset(train_fallback, num_images, 0, world)[0])
        loader = EvaluationLoader(dataset, batch_size, self._workers(), self.max_bad_share, persistent, largest_share)
        if persistent:
            self._persistent.append(loader)
        return loader

    # -- inside

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _workers(self) -> WorkerOptions:
        on_gpu = self.trainer is None or self.trainer.strategy.root_device.type == "cuda"
        here = self.trainer.num_devices if self.trainer is not None else 1
        loaders = here * (2 if self.val_size else 1)
        prefetch = prefetched_batches(
            self.num_workers, PREFETCH_BATCHES, self.batch_size * self._image_bytes, loaders, self.batch_size
        )
        pinned = on_gpu and torch.cuda.is_available()
        return WorkerOptions(self.num_workers, pinned, prefetch, self.worker_timeout_s)
