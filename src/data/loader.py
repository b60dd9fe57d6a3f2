"""Load batches. Training: in the order of `EpochOrder`, resumable at any batch. Evaluation: a fixed order."""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from src.core.errors import UserError
from src.core.stopping import ignore_in_worker
from src.data.dataset import ATTEMPTS, EvaluationDataset, Failure, MixDataset, Sample, TrainDataset, collate
from src.data.order import EpochOrder, Item
from src.data.sources import printable
from src.data.worker_faults import batches_of, check_temporary_folder, start_method

log = logging.getLogger(__name__)

PREFETCH_BATCHES = 4
"""Batches that each worker prefetches."""
JUDGE_AFTER = 1000
"""Fewest images (or one epoch, if smaller) over which the share of bad ones is computed."""


@dataclass(frozen=True)
class WorkerOptions:
    """Settings of DataLoader workers. num_workers 0: load in the calling process. pin_memory: page-locked batches, for a GPU.

    prefetch: batches that each worker prefetches. timeout_s: longest wait for one batch; 0: no limit.
    start: fork costs no start-up time; workers use neither the GPU nor threads.
    """

    num_workers: int
    pin_memory: bool
    prefetch: int = PREFETCH_BATCHES
    timeout_s: float = 0
    start: str = "fork" if sys.platform == "linux" else "spawn"

    def arguments(self, persistent: bool) -> dict[str, Any]:
        """Return keyword arguments for a DataLoader. Raises UserError if its workers could not hand over batches."""
        if not self.num_workers:
            return {"num_workers": 0, "pin_memory": self.pin_memory}
        check_temporary_folder()
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory,
            "prefetch_factor": self.prefetch,
            "timeout": self.timeout_s,
            "persistent_workers": persistent,
            "multiprocessing_context": start_method(self.start),
            "worker_init_fn": ignore_in_worker,
        }


@dataclass
class BadImages:
    """Count bad images, log each once, and stop above a maximum share.

    max_share: bad images per image seen by this process, 0..1; 0 stops at the first one.
    epoch_images: images this process sees in one epoch.
    """

    max_share: float
    epoch_images: int
    seen: int = 0
    bad: int = 0
    names: set[str] = field(default_factory=set)

    def account(self, images: int, failures: tuple[Failure, ...], stuck: bool = False) -> None:
        """Add one batch. `stuck`: an image could not be replaced either. Raises UserError above the share."""
        self.seen += images
        self.bad += len(failures)
        for failure in failures:
            if failure.name not in self.names:
                self.names.add(failure.name)
                log.warning("Bad image %s: %s", printable(failure.name), printable(failure.reason))
        allowed = self.max_share * max(self.seen, min(JUDGE_AFTER, self.epoch_images))
        if failures and (stuck or self.bad > allowed):
            last = printable(f"{failures[-1].name}: {failures[-1].reason}")
            why, instead = f"more than data.max_bad_share={self.max_share:g} allows", ", or raise data.max_bad_share"
            if self.bad <= allowed:
                why, instead = f"and no good one was found in {ATTEMPTS} attempts to replace one", ""
            raise UserError(
                f"{self.bad} bad images among the first {self.seen} ({len(self.names)} different ones), {why}. The last: {last}. "
                f"Fix or remove the files (create_hf_test_data.py leaves bad ones out and lists them){instead}."
            )


class _Loader:
    """A DataLoader whose workers can be stopped."""

    def __init__(self, dataset: Dataset[Sample], workers: WorkerOptions, persistent: bool, **options: Any) -> None:
        self.dataset = dataset
        self._loader = DataLoader(dataset, collate_fn=collate, **options, **workers.arguments(persistent))

    def close(self) -> None:
        """Stop the workers; the next pass starts new ones.

        The garbage collector may close their queues first, and then each one can delay the shutdown by five seconds.
        """
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


class _Batches:
    """The batch sampler of a DataLoader; epoch and start are set before each pass."""

    def __init__(self, order: EpochOrder) -> None:
        self.order, self.epoch, self.start = order, 0, 0

    def __iter__(self) -> Iterator[list[Item]]:
        return self.order.epoch(self.epoch, self.start)


class TrainLoader(_Loader):
    """Training batches of one rank, as described in `collate`, without `failures`.

    One iteration covers the rest of `epoch` from batch `start_batch`; `len()` counts the whole epoch. Epoch and start
    are read at the first batch, not at `iter()`: Lightning calls `iter()` before it sets the epoch with
    `loader.sampler.set_epoch`.
    """

    def __init__(
        self,
        dataset: TrainDataset | MixDataset,
        order: EpochOrder,
        workers: WorkerOptions,
        max_bad_share: float | Sequence[float],
        same_epoch: bool = False,
    ) -> None:
        """max_bad_share: for the dataset, or one per source of a mix. same_epoch: every epoch repeats the first one."""
        self.order, self.batch_size = order, order.batch_size
        self.epoch, self.start_batch, self.same_epoch = 0, 0, same_epoch
        allowed = [max_bad_share] if isinstance(max_bad_share, float | int) else max_bad_share
        self.bad_images = [BadImages(share, order.batches * order.batch_size) for share in allowed]
        self._batches = _Batches(order)
        super().__init__(dataset, workers, persistent=True, batch_sampler=self._batches)

    @property
    def sampler(self) -> "TrainLoader":
        return self

    def __len__(self) -> int:
        return self.order.batches

    def set_epoch(self, epoch: int) -> None:
        """Continue with `epoch`. Keeps `start_batch` if it belongs to that epoch, else starts at its first batch."""
        if epoch != self.epoch:
            self.resume_at(epoch, 0)

    def resume_at(self, epoch: int, start_batch: int) -> None:
        """Start the next iteration at batch `start_batch` of `epoch`, both counted from 0."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"batch {start_batch} of {len(self)}")
        self.epoch, self.start_batch = epoch, start_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._batches.epoch, self._batches.start = 0 if self.same_epoch else self.epoch, self.start_batch
        self.start_batch = 0
        for batch in batches_of(self._loader):
            stuck = len(batch["position"]) < self.batch_size
            failures = batch.pop("failures")
            for source, bad_images in enumerate(self.bad_images):
                own = tuple(f for f in failures if f.source == source)
                seen = int((batch["source"] == source).sum()) if "source" in batch else self.batch_size
                bad_images.account(seen, own, stuck and len(own) > ATTEMPTS)
            yield batch


class EvaluationLoader(_Loader):
    """Evaluation batches of one rank, in fixed order, as described in `collate`, without `failures`.

    Bad images are skipped, so a batch may be smaller; no image is repeated, so ranks may differ by a batch.
    """

    def __init__(
        self,
        dataset: EvaluationDataset,
        batch_size: int,
        workers: WorkerOptions,
        max_bad_share: float,
        persistent: bool,
        largest_share: int | None = None,
    ) -> None:
        """largest_share: images of the rank with the most, for `len`; None: this rank's own. Lightning skips evaluation on a
        rank whose loader has length 0, and the other ranks would wait for it."""
        self.batch_size, self.max_bad_share = batch_size, max_bad_share
        self._share, self._largest_share = len(dataset), largest_share or len(dataset)
        generator = torch.Generator()  # else each pass draws an unused seed from the global generator
        super().__init__(dataset, workers, persistent, batch_size=batch_size, generator=generator)

    def __len__(self) -> int:
        """Count the batches of the rank with the most; this one may end earlier."""
        return -(-self._largest_share // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        bad_images = BadImages(self.max_bad_share, self._share)
        for batch in batches_of(self._loader):
            failures = batch.pop("failures")
            bad_images.account(len(batch["position"]) + len(failures), failures)
            if len(batch["position"]):
                yield batch
