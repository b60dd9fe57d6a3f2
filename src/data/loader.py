"""The loaders. Training: batches by `EpochOrder`, resumable at any. Evaluation: a fixed order, each image once."""

import logging
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from src.core.errors import UserError
from src.data.dataset import EvaluationDataset, Failure, Sample, TrainDataset, collate
from src.data.order import EpochOrder, Item

log = logging.getLogger(__name__)

WorkerStart = Literal["auto", "fork", "forkserver", "spawn"]
JUDGE_AFTER = 1000
"""Images (or one epoch, if smaller) by which the share of bad ones is measured at the earliest."""


@dataclass(frozen=True)
class WorkerOptions:
    """Processes that load. num_workers 0: none, the calling process loads. prefetch_factor: batches ahead per worker.
    worker_start `auto`: fork on Linux (no start-up cost; workers touch neither the GPU nor threads), else spawn."""

    num_workers: int
    prefetch_factor: int
    pin_memory: bool
    worker_start: WorkerStart

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers}: expected 0 (load in the main process) or more.")
        if self.prefetch_factor < 1:
            raise UserError(f"data.prefetch_factor={self.prefetch_factor}: expected at least 1 batch per worker.")
        if self.worker_start not in ("auto", *multiprocessing.get_all_start_methods()):
            raise UserError(
                f"data.worker_start={self.worker_start}: expected auto, "
                f"{', '.join(multiprocessing.get_all_start_methods())}."
            )

    def arguments(self, persistent: bool) -> dict[str, Any]:
        """Keyword arguments for a DataLoader."""
        arguments: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": self.pin_memory}
        if self.num_workers:
            start = self.worker_start
            if start == "auto":
                start = "fork" if sys.platform == "linux" else "spawn"
            arguments |= {
                "prefetch_factor": self.prefetch_factor,
                "persistent_workers": persistent,
                "multiprocessing_context": start,
                "worker_init_fn": ignore_sigterm,
            }
        return arguments


def ignore_sigterm(worker: int) -> None:
    """A scheduler signals a whole process group; the training process then still needs its next batch to stop cleanly."""
    del worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@dataclass
class BadImages:
    """Counts images that can't be decoded, names each once in the log, stops above a share.

    max_share: bad images per image seen by this process, 0..1; 0 stops at the first one.
    epoch_images: images this process sees in one epoch.
    """

    max_share: float
    epoch_images: int
    seen: int = 0
    bad: int = 0
    names: set[str] = field(default_factory=set)

    def account(self, images: int, failures: tuple[Failure, ...], stuck: bool = False) -> None:
        """Take in one batch. `stuck`: an image could not even be replaced. Raises UserError."""
        self.seen += images
        self.bad += len(failures)
        for failure in failures:
            if failure.name not in self.names:
                self.names.add(failure.name)
                log.warning("Bad image %s: %s", failure.name, failure.reason)
        allowed = self.max_share * max(self.seen, min(JUDGE_AFTER, self.epoch_images))
        if failures and (stuck or self.bad > allowed):
            last = failures[-1]
            raise UserError(
                f"{self.bad} bad images among the first {self.seen} ({len(self.names)} different ones), more than "
                f"data.max_bad_share={self.max_share:g} allows. The last: {last.name}: {last.reason}. Mend or remove "
                "the files (create_hf_test_data.py leaves bad ones out and lists them), or raise data.max_bad_share."
            )


def _stop_workers(loader: DataLoader[Sample]) -> None:
    """End persistent workers now. Left to the garbage collector, which may close their queues first, each of them can
    take five seconds to be noticed; a new pass starts new ones."""
    iterator = loader._iterator
    loader._iterator = None
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


class _Batches:
    """The batch sampler that a DataLoader iterates over; where it starts is set before each pass."""

    def __init__(self, order: EpochOrder) -> None:
        self.order, self.epoch, self.start = order, 0, 0

    def __iter__(self) -> Iterator[list[Item]]:
        return self.order.epoch(self.epoch, self.start)

    def __len__(self) -> int:
        return self.order.batches


class TrainLoader:
    """Batches of one rank for training, as `collate` describes them, without `failures`.

    One iteration is the rest of `epoch` from batch `start_batch` on; `len()` counts the whole epoch. Epoch and start
    are read at the first batch, not at `iter()`: Lightning calls `iter()` before it sets the epoch. `state_dict` names
    the batch after the one handed out last, and the next epoch after the last one. Lightning calls
    `loader.sampler.set_epoch`.
    """

    def __init__(self, dataset: TrainDataset, order: EpochOrder, workers: WorkerOptions, max_bad_share: float) -> None:
        if order.length != len(dataset):
            raise ValueError(f"an order of {order.length} for {len(dataset)} images")
        self.dataset = dataset
        self.order = order
        self.epoch = 0
        self.start_batch = 0
        self.bad_images = BadImages(max_bad_share, order.batches * order.batch_size)
        self.batch_size = order.batch_size
        self._handed_out: tuple[int, int] | None = None  # epoch, batches
        self._batches = _Batches(order)
        self._loader: DataLoader[Sample] = DataLoader(
            dataset, batch_sampler=self._batches, collate_fn=collate, **workers.arguments(persistent=True)
        )

    @property
    def sampler(self) -> "TrainLoader":
        return self

    def close(self) -> None:
        """End the worker processes; the loader stays usable."""
        _stop_workers(self._loader)

    def __len__(self) -> int:
        return self.order.batches

    def set_epoch(self, epoch: int) -> None:
        """Go on with `epoch`. Keeps `start_batch` where it belongs to that epoch, else starts at its first batch."""
        if epoch != self.epoch:
            self.resume_at(epoch, 0)

    def resume_at(self, epoch: int, start_batch: int) -> None:
        """The next iteration begins at batch `start_batch` of `epoch`, both from 0."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"batch {start_batch} of {len(self)}")
        self.epoch, self.start_batch, self._handed_out = epoch, start_batch, None

    def state_dict(self) -> dict[str, int]:
        epoch, batch = self._handed_out or (self.epoch, self.start_batch)
        return {"epoch": epoch + 1, "start_batch": 0} if batch >= len(self) else {"epoch": epoch, "start_batch": batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resume_at(state["epoch"], state["start_batch"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, start, self.start_batch = self.epoch, self.start_batch, 0
        self._batches.epoch, self._batches.start = epoch, start
        self._handed_out = (epoch, start)
        for number, batch in enumerate(self._loader, start):
            wanted = self.order.batch_size
            self.bad_images.account(wanted, batch.pop("failures"), stuck=len(batch["position"]) < wanted)
            self._handed_out = (epoch, number + 1)
            yield batch


class EvaluationLoader:
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
        """`largest_share`: images of the rank that has most, for `len`: of a rank whose loader says 0, Lightning leaves out
        the whole evaluation, and the others would wait for it. None: this one's own."""
        if batch_size < 1:
            raise UserError(f"A batch size of {batch_size} for evaluation: expected at least 1.")
        self.dataset = dataset
        self.batch_size = batch_size
        self._largest_share = len(dataset) if largest_share is None else largest_share
        self.max_bad_share = max_bad_share
        self._loader: DataLoader[Sample] = DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=False,
            collate_fn=collate,
            generator=torch.Generator(),  # or each pass would take a number from the global one, for seeds nobody uses
            **workers.arguments(persistent),
        )

    def close(self) -> None:
        """End the worker processes; the loader stays usable."""
        _stop_workers(self._loader)

    def __len__(self) -> int:
        """Batches of the rank that has most; this one may end earlier."""
        return -(-self._largest_share // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        bad_images = BadImages(self.max_bad_share, len(self.dataset))
        for batch in self._loader:
            failures = batch.pop("failures")
            bad_images.account(len(batch["position"]) + len(failures), failures)
            if len(batch["position"]):
                yield batch
