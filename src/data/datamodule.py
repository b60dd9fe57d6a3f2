"""Build the data of a run from the keys of `configs/data/*.yaml`. The only file in `src/data` that uses Lightning."""

import itertools
import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule

from src.core.errors import UserError, worded
from src.data import dummy, mix
from src.data.dataset import EvaluationDataset, EvaluationTransform, MixDataset, TrainDataset, TrainTransform
from src.data.decode import Decoder
from src.data.fingerprint import compare_fingerprints, source_state
from src.data.latents import LatentStore
from src.data.loader import PREFETCH_BATCHES, EvaluationLoader, TrainLoader, WorkerOptions
from src.data.order import EpochOrder, Rows, evaluation_rows
from src.data.places import locate
from src.data.settings import DataSettings, EvaluationSettings, SourceSettings
from src.data.sources import ReadOptions, Source, short_digest
from src.data.splits import Splits, open_evaluation, open_splits
from src.data.worker_faults import prefetched_batches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSet:
    """Images to evaluate on. settings: None for the images held out from training."""

    source: Source
    rows: Rows
    settings: EvaluationSettings | None = None


class RAEDataModule(LightningDataModule):
    """Training crops and evaluation images. `configs/data/imagenet.yaml` documents each argument.

    World size and rank come from the attached trainer, else 1 and 0. For the batches see `src.data.dataset.collate`.
    """

    check_arguments = DataSettings.of

    def __init__(self, **node: Any) -> None:
        super().__init__()
        self.settings = s = DataSettings.of(node)
        self.is_mix = s.sources is not None
        self.sources, self.evaluation_settings = s.parse_sources(), s.parse_evaluation()
        self.batch_size, self.num_workers = s.batch_size, s.num_workers
        self.train_transforms = [
            TrainTransform(
                s.image_size, one.train_crop, one.resize_shorter_px, Decoder(one.exif, one.max_megapixels), s.seed
            )
            for one in self.sources.values()
        ]
        self.evaluation_transform = EvaluationTransform(s.image_size, Decoder(s.exif, s.max_megapixels))
        self.same_epoch = False
        """Whether every epoch repeats the first one (`trainer.overfit_batches`)."""
        self._compared = False
        self._persistent: list[TrainLoader | EvaluationLoader] = []

    # -- opening the data

    def prepare_data(self) -> None:
        """Generate the project's small sample datasets and download hub datasets, if missing."""
        places = [(f"data.sources.{name}" if name else "data", one) for name, one in self.sources.items()]
        for key, one in places + [(f"data.evaluation.{name}", one) for name, one in self.evaluation_settings.items()]:
            with worded({"data.data_dir": f"{key}.data_dir"}):
                found = locate(one.data_dir, download=True)
            if isinstance(found, Path):
                dummy.ensure(found)

    def setup(self, stage: str | None = None) -> None:
        """Open the data. Raises UserError if there is none."""
        _ = self.opened

    @cached_property
    def opened(self) -> list[Splits]:
        """Open the data of each source."""
        opened = []
        for name, s in self.sources.items():
            own = SourceSettings.model_fields if self.is_mix else ()
            with worded({f"data.{key}": f"data.sources.{name}.{key}" for key in own}):
                place, options = locate(s.data_dir), self._options(s.image_column, s.label)
                splits = open_splits(place, s.use_hf_dataset, s.hf_split, s.hf_validation_split, s.train_split, options)
            if self.is_mix and isinstance(splits.train, LatentStore):
                raise UserError(
                    f"data.sources.{name} holds stored latents, which can't be mixed: set data.data_dir to them."
                )
            log.info("Data%s: %s", f" {name}" if name else "", splits.description)
            opened.append(splits)
        return opened

    def teardown(self, stage: str | None = None) -> None:
        """Stop the persistent workers of all loaders."""
        while self._persistent:
            self._persistent.pop().close()

    @property
    def splits(self) -> Splits:
        """Return the first source's splits."""
        return self.opened[0]

    @property
    def latent_store(self) -> LatentStore | None:
        """Return the stored latents if batches hold latents (`latent`); None if they hold images (`image`)."""
        source = self.splits.train
        return source if isinstance(source, LatentStore) else None

    @property
    def train_size(self) -> int:
        return sum(len(splits.train_rows) for splits in self.opened)

    @property
    def val_size(self) -> int:
        """Count the images of the first evaluation set."""
        first = next(iter(self.evaluation_sets.values()), None)
        return len(first.rows) if first is not None else 0

    @property
    def num_classes(self) -> int | None:
        """Count the classes of the labels in batches (`label`); None if there are none. Raises UserError if a label means
        different classes in different parts of the data."""
        used = [
            (f"data.sources.{name}" if name else "training", one.train)
            for name, one in zip(self.sources, self.opened, strict=True)
        ]
        used += [
            (f"data.evaluation.{name}" if name else "evaluation", one.source)
            for name, one in self.evaluation_sets.items()
        ]
        named = [(key, source.class_names) for key, source in used if source.class_names]
        for (first, ours), (other, theirs) in itertools.combinations(named, 2):
            for label, (one, another) in enumerate(zip(ours, theirs, strict=False)):
                if one != another:
                    raise UserError(
                        f"Label {label} is {one!r} in {first} and {another!r} in {other}. Give all "
                        "parts the same classes in the same order; for image folders, create the same class folders in each."
                    )
        return max((source.num_classes or 0 for _, source in used), default=0) or None

    @cached_property
    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """Return the evaluation sets by name: those of `data.evaluation`, else the first source's held-out images under an
        empty name; empty if there are none."""
        if not self.evaluation_settings:
            source, rows = self.splits.validation, self.splits.validation_rows
            return {} if source is None else {"": EvaluationSet(source, rows)}
        found = {}
        for name, s in self.evaluation_settings.items():
            keys = {key: key for key in EvaluationSettings.model_fields} | {"hf_split": "split"}
            with worded({f"data.{common}": f"data.evaluation.{name}.{key}" for common, key in keys.items()}):
                source, text = open_evaluation(locate(s.data_dir), s.split, self._options(s.image_column, s.label))
            log.info("Evaluation set %s: %s", name, text)
            found[name] = EvaluationSet(source, range(len(source)), s)
        return found

    def describe(self) -> list[tuple[str, str]]:
        """Return (name, text) rows that describe each source and evaluation set, for tables."""
        shares = mix.shares(self._weights()) / mix.BLOCK
        rows = []
        for (name, s), splits, share in zip(self.sources.items(), self.opened, shares, strict=True):
            notes = [f"{len(splits.train_rows):,} training images"]
            if self.is_mix:
                notes.append(f"weight {s.weight:g}, {share * self.order_length:,.0f} an epoch")
            elif not self.evaluation_settings:
                notes.append(f"{self.val_size:,} held out")
            if splits.train.num_classes:
                notes.append(f"{splits.train.num_classes:,} classes")
            if (built := getattr(splits.train, "index_built", None)) is not None:
                notes.append("index built" if built else "index read")
            rows.append((f"data {name}".rstrip(), f"{splits.kind}: {', '.join(notes)}, {s.data_dir}"))
        for name, found in self.evaluation_sets.items():
            if found.settings is not None:
                rows.append((f"evaluation {name}", f"{len(found.rows):,} images, {found.settings.data_dir}"))
        return rows

    @property
    def fingerprint(self) -> str:
        """Identify the data and its split as `HEX-train_rows-validation_rows`; depends on the files, not on the seed."""
        parts = ["+".join(source.fingerprint() for source in splits.sources) for splits in self.opened]
        own = parts[0]
        if self.is_mix:
            own = short_digest(repr((parts, self._weights(), self.order_length, self.settings.mix_unit)).encode())
        return f"{own}-{self.train_size}-{self.val_size}"

    @cached_property
    def fingerprint_state(self) -> dict[str, Any]:
        """Return a fingerprint of the data, file by file, as plain values for checkpoints."""
        sources = dict(zip(("training", "evaluation"), self.splits.sources, strict=False))
        if self.is_mix:
            sources = {name: splits.train for name, splits in zip(self.sources, self.opened, strict=True)}
        for name, found in self.evaluation_sets.items():
            if found.settings is not None:
                sources[f"evaluation {name}"] = found.source
        state: dict[str, Any] = {
            "rows": {"training": self.train_size, "evaluation": self.val_size},
            "sources": {name: source_state(source) for name, source in sources.items()},
        }
        if self.is_mix:
            mixed = {"weights": list(self._weights()), "epoch_images": self.order_length, "block": mix.BLOCK}
            state["mix"] = mixed | {"unit": self.settings.mix_unit, "names": list(self.sources)}
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning saves in a checkpoint about the data."""
        return {"fingerprint": self.fingerprint_state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's data with the current data. Raises UserError if they differ, unless `allow_changed`."""
        self._compared = True
        changes = compare_fingerprints(state_dict.get("fingerprint") or {}, self.fingerprint_state)
        if not changes:
            return
        named = "; ".join(changes[:10]) + (f"; and {len(changes) - 10} more" if len(changes) > 10 else "")
        if self.settings.allow_changed:
            log.warning("The data differs from that of the checkpoint (data.allow_changed=true): %s.", named)
            return
        raise UserError(
            f"The data differs from that of the checkpoint: {named}. Order, split and held-out images would differ. Restore the "
            "data of that run, or resume with the current data by data.allow_changed=true."
        )

    # -- training

    @property
    def order_length(self) -> int:
        """Count the images of an epoch, including those of the last, partial batch."""
        if not self.is_mix:
            return self.train_size
        sizes = [len(splits.train_rows) for splits in self.opened]
        return self.settings.epoch_images or mix.images_per_epoch(sizes, self._weights())

    @property
    def order(self) -> EpochOrder:
        """Assign images to the batches of this rank. Raises UserError if a global batch can't be filled."""
        world, rank = self._ranks()
        place = (self.order_length, self.settings.seed, self.batch_size, world, rank, self.settings.accumulate)
        if len(self.sources) == 1 and self.order_length == self.train_size:
            return EpochOrder(*place)
        sizes = tuple(len(splits.train_rows) for splits in self.opened)
        return mix.MixOrder(*place, sizes, self._weights(), self.settings.mix_unit)

    def train_dataloader(self) -> TrainLoader:
        _ = self.fingerprint_state  # compute it before training starts
        if self.trainer is not None and self.trainer.ckpt_path and not self._compared:
            log.warning("The checkpoint has no fingerprint of its data, so the current data can't be compared with it.")
            self._compared = True
        parts = [
            TrainDataset(splits.train, splits.train_rows, _transform(splits.train, transform), self.settings.seed)
            for splits, transform in zip(self.opened, self.train_transforms, strict=True)
        ]
        dataset = MixDataset(parts) if self.is_mix else parts[0]
        allowed = [s.max_bad_share for s in self.sources.values()]
        loader = TrainLoader(dataset, self.order, self._workers(), allowed, self.same_epoch)
        self._persistent.append(loader)
        return loader

    # -- evaluation

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Load this rank's share of the first evaluation set; an empty list (no validation) if there is none."""
        if not self.val_size:
            return []
        world, rank = self._ranks()
        return self.evaluation_loader(self.evaluation_set(), self.batch_size, None, rank, world, persistent=True)

    def evaluation_set(self, name: str | None = None, or_training: bool = False) -> EvaluationSet:
        """Return the evaluation set of that name; None: the first one.

        Raises:
            UserError: there is none, and `or_training` does not allow the training images instead.
        """
        if sets := self.evaluation_sets:
            return next(iter(sets.values())) if name is None else sets[name]
        if or_training:
            return EvaluationSet(self.splits.train, self.splits.train_rows)
        first = next(iter(self.sources.values()))
        raise UserError(
            f"{first.data_dir} has no validation split and data.train_split={first.train_split:g} holds nothing "
            "out. Set data.train_split=0.95 (say), name a split with data.hf_validation_split, or evaluate on "
            "training images with callbacks.rfid.use_train_dataloader=true."
        )

    def evaluation_dataset(self, found: EvaluationSet, num_images: int | None = None) -> EvaluationDataset:
        """Return the images of a set, centre-cropped: the first `num_images` of a shuffled order that depends only on the
        size of the set."""
        chosen = evaluation_rows(len(found.rows), num_images)
        if isinstance(found.rows, np.ndarray):
            chosen = found.rows[chosen]
        return EvaluationDataset(found.source, chosen, _transform(found.source, self.evaluation_transform))

    def evaluation_loader(
        self,
        found: EvaluationSet,
        batch_size: int,
        num_images: int | None = None,
        rank: int = 0,
        world: int = 1,
        persistent: bool = False,
    ) -> EvaluationLoader:
        """Load every `world`-th image of `evaluation_dataset`, starting at `rank`, in batches. persistent: keep the workers
        between passes."""
        dataset = self.evaluation_dataset(found, num_images)
        largest_share = len(dataset.rows[::world])
        dataset.rows = dataset.rows[rank::world]
        loader = EvaluationLoader(
            dataset, batch_size, self._workers(), self.settings.max_bad_share, persistent, largest_share
        )
        if persistent:
            self._persistent.append(loader)
        return loader

    # -- internal

    def _options(self, image: str | None, label: str | None) -> ReadOptions:
        return ReadOptions(image, label, self.settings.storage_options, self.settings.cache_gb)

    def _weights(self) -> tuple[float, ...]:
        return tuple(s.weight for s in self.sources.values())

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _workers(self) -> WorkerOptions:
        on_gpu = self.trainer is None or self.trainer.strategy.root_device.type == "cuda"
        here = self.trainer.num_devices if self.trainer is not None else 1
        loaders = here * (2 if self.val_size else 1)
        store, batch = self.latent_store, self.batch_size
        each = 3 * self.settings.image_size**2 if store is None else 4 * math.prod(store.shape)  # bytes
        prefetch = prefetched_batches(self.num_workers, PREFETCH_BATCHES, batch * each, loaders, batch)
        pinned = on_gpu and torch.cuda.is_available()
        return WorkerOptions(self.num_workers, pinned, prefetch, self.settings.worker_timeout_s)


def _transform(source: Source, images: Any) -> Any:
    """Return the transform from stored bytes to a sample: `images`, unless the source holds latents."""
    return source.decoded if isinstance(source, LatentStore) else images
