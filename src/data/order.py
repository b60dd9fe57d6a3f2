"""Assign images to batches as a pure function of (length, seed, epoch), split over ranks and micro-batches.

Legend: n images, W ranks, b batch per rank, k micro-batches per optimiser step; a global batch is W * b * k images.

Position p is an image's index in the epoch's order over all ranks. Micro-batch i of rank r takes the positions
[(i * W + r) * b, (i * W + r) * b + b), so global batch g is always [g * W * b * k, (g + 1) * W * b * k): the same
images for any W, b, k of equal product. The last, partial global batch is dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from src.core import random_streams as stream
from src.core.errors import UserError


class Item(NamedTuple):
    """Index of a training sample. It carries the epoch, so persistent workers need not be told."""

    epoch: int
    position: int
    row: int
    """Index in the training images, 0..n-1."""


@dataclass(frozen=True)
class EpochOrder:
    """The batches of one rank.

    Raises:
        UserError: fewer images than one global batch.
    """

    length: int
    seed: int
    batch_size: int
    world: int = 1
    rank: int = 0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.length < self.global_batch:
            raise UserError(self._too_few())

    @property
    def global_batch(self) -> int:
        return self.world * self.batch_size * self.accumulate

    @property
    def batches(self) -> int:
        """Count the micro-batches per epoch and rank; a multiple of `accumulate`."""
        return self.length // self.global_batch * self.accumulate

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[list[Item]]:
        """Yield the rank's micro-batches, starting at number `start_batch`."""
        order = self.order_of(epoch)
        for i in range(start_batch, self.batches):
            first = (i * self.world + self.rank) * self.batch_size
            positions = np.arange(first, first + self.batch_size)
            yield [Item(epoch, p, row) for p, row in zip(positions.tolist(), order(positions).tolist(), strict=True)]

    def order_of(self, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function from positions of an epoch to rows, int64."""
        return stream.permutation(self.seed, epoch, self.length).__getitem__

    def _too_few(self) -> str:
        w, b, k = self.world, self.batch_size, self.accumulate
        parts = [f"data.batch_size={b}"]
        parts += [f"trainer.accumulate_grad_batches={k}"] if k > 1 else []
        parts += [f"{w} processes"] if w > 1 else []
        wanted = f"{' x '.join(parts)} = {self.global_batch} images"
        largest = self.length // (w * k)
        if largest:
            advice = f"The largest that fits is data.batch_size={largest}."
        elif self.length >= w:
            advice = f"Set trainer.accumulate_grad_batches={self.length // w} or less and data.batch_size=1."
        elif self.length:
            advice = f"Use at most {self.length} processes (trainer.devices), data.batch_size=1 and no accumulation."
        else:
            advice = "Check data.data_dir and data.train_split."
        return f"There are {self.length} training images, fewer than one step needs ({wanted}). {advice}"


def evaluation_rows(length: int, num_images: int | None = None, world: int = 1, rank: int = 0) -> np.ndarray:
    """Return the rows one rank evaluates, int64: the first `num_images` of an order that depends on `length` alone.

    The order is shuffled, so that the first thousand images of a class-sorted dataset cover all classes, and a smaller
    set is a prefix of a larger one. Ranks take every W-th image; none is repeated, so shares may differ by one.
    """
    order = stream.generator(0, stream.Purpose.EVALUATION_ORDER).permutation(length)
    return order[:num_images][rank::world]


Rows = np.ndarray | range
"""Rows of a source; a range, which takes no memory, for all rows."""


def split_rows(length: int, train_share: float) -> tuple[Rows, np.ndarray]:
    """Return (training rows, held-out rows), each sorted; a function of length and share, not of the run's seed.

    round(length * train_share) rows are for training, drawn at random so that both parts cover all classes.
    """
    cut = round(length * train_share)
    if cut == length:
        return range(length), np.empty(0, np.int64)
    order = stream.generator(0, stream.Purpose.SPLIT).permutation(length)
    return np.sort(order[:cut]), np.sort(order[cut:])
