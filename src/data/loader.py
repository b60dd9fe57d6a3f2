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
"""Batches that each loading process prepares ahead."""
JUDGE_AFTER = 1000
"""Images (or one epoch, if smaller) by which the share of bad ones is measured at the earliest."""


@dataclass(frozen=True)
class WorkerOptions:
    """Processes that load. num_workers 0: none, the calling process loads. pin_memory: page-locked batches, for a GPU.

    prefetch: batches that each process prepares ahead. timeout_s: longest wait for one batch; 0: no limit.
    start: fork costs no start-up time; workers touch neither the GPU nor threads.
    """

    num_workers: int
    pin_memory: bool
    prefetch: int = PREFETCH_BATCHES
    timeout_s: float = 0
    start: str = "fork" if sys.platform == "linux" else "spawn"

    def arguments(self, persistent: bool) -> dict[str, Any]:
        """Return keyword arguments for a DataLoader. UserError: its processes could not hand over what they load."""
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
    """Count images that can't be decoded, log each once, stop above a share.

    max_share: bad images per image seen by this process, 0..1; 0 stops at the first one.
    epoch_images: images this process sees in one epoch.
    """

    max_share: float
    epoch_images: int
    seen: int = 0
    bad: int = 0
    names: set[str] = field(default_factory=set)

    def account(self, images: int, failures: tuple[Failure, ...], stuck: bool = False) -> None:
        """Add one batch. `stuck`: an image could not even be replaced. Raises UserError above the share."""
        self.seen += images
        self.bad += len(failures)
        for failure in failures:
            if failure.name not in self.names:
                self.names.add(failure.name)
                log.warning("Bad image %s: %s", printable(failure.name), printable(failure.reason))
        allowed = self.max_share * max(self.seen, min(JUDGE_AFTER, self.epoch_images))
        if failures and (stuck or self.bad > allowed):
            last = printable(f"{failures[-1].name}: {failures[-1].reason}")
            raise UserError(
                f"{self.bad} bad images among the first {self.seen} ({len(self.names)} different ones), more than "
                f"data.max_bad_share={self.max_share:g} allows. The last: {last}. Fix or remove "
                "the files (create_hf_test_data.py leaves bad ones out and lists them), or raise data.max_bad_share."
            )


class _Loader:
    """A DataLoader whose worker processes can be ended."""

    def __init__(self, dataset: Dataset[Sample], workers: WorkerOptions, persistent: bool, **options: Any) -> None:
        self.dataset = dataset
        self._loader = DataLoader(dataset, collate_fn=collate, **options, **workers.arguments(persistent))

    def close(self) -> None:
        """End the worker processes; the next pass starts new ones.

        Left to the garbage collector, which may close their queues first, each can take five seconds to be noticed.
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
    """Batches of one rank for training, as `collate` describes them, without `failures`.

    One iteration is the rest of `epoch` from batch `start_batch` on; `len()` counts the whole epoch. Epoch and start
    are read at the first batch, not at `iter()`: Lightning calls `iter()` before it sets the epoch, by
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
        """max_bad_share: of the dataset, or of each source of a mix. same_epoch: every epoch is the first one again."""
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
        """Continue with `epoch`. Keeps `start_batch` where it belongs to that epoch, else starts at its first batch."""
        if epoch != self.epoch:
            self.resume_at(epoch, 0)

    def resume_at(self, epoch: int, start_batch: int) -> None:
        """Begin the next iteration at batch `start_batch` of `epoch`, both from 0."""
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
    """One rank's share of the evaluation images, in fixed order, as `collate` describes them, without `failures`.

    Bad images are left out, so that a batch may be smaller; no image comes twice, so ranks may differ by a batch.
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
        """largest_share: images of the rank that has most, for `len`; None: this one's own. A rank whose loader says 0
        would skip the evaluation under Lightning, and the others wait for it."""
        self.batch_size, self.max_bad_share = batch_size, max_bad_share
        self._share, self._largest_share = len(dataset), largest_share or len(dataset)
        generator = torch.Generator()  # or each pass would take a number from the global one, for seeds nobody uses
        super().__init__(dataset, workers, persistent, batch_size=batch_size, generator=generator)

    def __len__(self) -> int:
        """Count the batches of the rank that has most; this one may end earlier."""
        return -(-self._largest_share // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        bad_images = BadImages(self.max_bad_share, self._share)
        for batch in batches_of(self._loader):
            failures = batch.pop("failures")
            bad_images.account(len(batch["position"]) + len(failures), failures)
            if len(batch["position"]):
                yield batch
