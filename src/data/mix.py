"""Mix sources in exact shares: compute the source and row at a position as a function of (seed, epoch, position).

Position p of epoch e is unit P = e N + p, N images per epoch. Each block of 1,000 units holds round(1000 w) of a source of
weight w (largest remainder), in a permutation drawn for the block. The k-th unit of a source in block b, counted in the
order of positions, is its draw d = b c + k, c its units per block; draw d is row `permutation(round d // n)[d % n]` of its n
rows. So shares are exact in every aligned block, no image repeats before all were drawn, and resuming is arithmetic.

Legend: s source, n its rows, d draw, N images per epoch; a unit is an image, or a whole global batch with `unit: batch`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from src.core import random_streams as stream
from src.core.errors import UserError
from src.data.order import EpochOrder

BLOCK = 1000
"""Units over which the shares are exact."""
TABLE_ROWS = 1 << 24
"""Sources with more rows are permuted without a table."""
FEISTEL_ROUNDS = 8
Unit = Literal["image", "batch"]


@dataclass(frozen=True)
class MixOrder(EpochOrder):
    """The batches of one rank from several sources. `length`: images per epoch. `Item.row` numbers the rows of all sources,
    one source after the other.

    sizes: rows of each source. weights: positive, any sum. unit: `image`, or `batch` for one source per update, as RAEv2.
    """

    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    unit: Unit = "image"
    _tables: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """For each source, its current round and the permutation of that round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares(self.weights)

    def order_of(self, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        return functools.partial(self.rows, epoch)

    def rows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the rows, int64, at positions of an epoch."""
        if self.unit == "batch":
            units = epoch * (self.length // self.global_batch) + positions // self.global_batch
        else:
            units = epoch * self.length + positions
        sources, draws = np.empty_like(units), np.empty_like(units)
        counts, blocks = shares(self.weights), units // BLOCK
        for block in np.unique(blocks).tolist():
            here = blocks == block
            pattern, number = _pattern(self.seed, block, self.weights)
            sources[here] = pattern[units[here] % BLOCK]
            draws[here] = block * counts[sources[here]] + number[units[here] % BLOCK]
        if self.unit == "batch":
            draws = draws * self.global_batch + positions % self.global_batch
        rows, base = np.empty_like(units), 0
        for s, size in enumerate(self.sizes):
            here = sources == s
            rounds, at = draws[here] // size, draws[here] % size
            found = np.empty_like(at)
            for r in np.unique(rounds).tolist():
                found[rounds == r] = self.permuted(s, r, at[rounds == r])
            rows[here] = base + found
            base += size
        return rows

    def permuted(self, source: int, round_: int, at: np.ndarray) -> np.ndarray:
        """Return entries `at`, int64, of a source's permutation of 0..size-1 in a round."""
        size = self.sizes[source]
        if size > TABLE_ROWS:
            return feistel(_feistel_keys(self.seed, source, round_), size, at)
        if self._tables.get(source, (None,))[0] != round_:
            table = np.arange(size, dtype=np.uint32)
            stream.generator(self.seed, stream.Purpose.ORDER, round_, source).shuffle(table)
            self._tables[source] = round_, table
        return self._tables[source][1][at].astype(np.int64)


def images_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """Return sum(w n) / sum(w), rounded: RAEv2's rule."""
    return round(sum(w * n for w, n in zip(weights, sizes, strict=True)) / sum(weights))


@functools.lru_cache(16)
def shares(weights: tuple[float, ...]) -> np.ndarray:
    """Return the units of each source per block, int64, by largest remainder; ties go to the earlier source.

    Raises:
        UserError: a weight too small for one unit.
    """
    exact = np.array(weights, np.float64) * (BLOCK / sum(weights))
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: BLOCK - int(counts.sum())]] += 1
    if not counts.all():
        raise UserError(
            f"data.sources: a weight of {weights[int(counts.argmin())]:g} out of {sum(weights):g} gives no image in {BLOCK:,}. "
            "Raise it, or leave the source out."
        )
    return counts


@functools.lru_cache(8)
def _pattern(seed: int, block: int, weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each unit of a block, and the unit's index among those of its source in the block."""
    counts = shares(weights)
    pattern = stream.generator(seed, stream.Purpose.MIX, 0, block).permutation(
        np.repeat(np.arange(len(counts)), counts)
    )
    number = np.empty(BLOCK, np.int64)
    for s, count in enumerate(counts.tolist()):
        number[pattern == s] = np.arange(count)
    return pattern, number


@functools.lru_cache(32)
def _feistel_keys(seed: int, source: int, round_: int) -> tuple[int, ...]:
    draws = stream.generator(seed, stream.Purpose.ORDER, round_, source)
    return tuple(draws.integers(0, 1 << 64, FEISTEL_ROUNDS, dtype=np.uint64).tolist())


def feistel(keys: Sequence[int], size: int, at: np.ndarray) -> np.ndarray:
    """Permute 0..size-1 without a table: a Feistel network over an even number of bits, with cycle walking.

    Only for large sizes: with a few hundred entries, some permutations are more frequent than others.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    values, waiting = at.astype(np.uint64), np.arange(len(at))
    while len(waiting):
        left, right = values[waiting] >> np.uint64(half), values[waiting] & mask
        for key in keys:
            left, right = (
                right,
                left ^ (_mix_bits(right + np.uint64(key & 0xFFFFFFFFFFFF) ^ np.uint64(key >> 48)) & mask),
            )
        values[waiting] = left << np.uint64(half) | right
        waiting = waiting[values[waiting] >= size]
    return values.astype(np.int64)


def _mix_bits(values: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 values (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
