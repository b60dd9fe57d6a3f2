"""Originals beside their reconstructions, as PNG files and contact sheets.

Legend: B batch, H, W image px. Images are uint8 3 x H x W.
"""

import heapq
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.core.distributed import gather_on_main
from src.core.images import difference, save_png, sheet
from src.evaluation.scoring_pass import ScoredBatch

COLUMNS = 8
"""Images in a row of a contact sheet."""
_THREADS = 4  # Pillow compresses outside of Python's lock
_WAITING = 256  # pictures in memory at most


class Pair(NamedTuple):
    badness: float
    """By which the worst are found; 0 where nobody asks."""
    place: int
    """In the order of evaluation."""
    row: int
    """Of the data set."""
    original: Tensor
    reconstruction: Tensor


class FirstPairs:
    """Keeps the pairs of the first `count` images of the order of evaluation (of the first variant)."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: list[Pair] = []

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        batch = variants[0]
        for i, (place, row) in enumerate(zip(batch.places.tolist(), batch.rows.tolist(), strict=True)):
            if place < self.count:
                self._kept.append(Pair(0.0, place, row, batch.original[i].cpu(), batch.decoded[i].cpu()))

    def gather(self) -> list[Pair]:
        """Return them in their order on rank 0, none on the others. On all ranks."""
        return sorted((pair for part in gather_on_main(self._kept) for pair in part), key=lambda pair: pair.place)


class WorstPairs:
    """Keeps the `count` worst pairs (of the first variant): largest LPIPS, else smallest PSNR."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._heap: list[tuple[float, int, Pair]] = []  # the best of the worst on top

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        batch = variants[0]
        lpips = next((value for name, value in batch.values.items() if name.startswith("lpips")), None)
        for i, badness in enumerate((-batch.values["psnr"] if lpips is None else lpips).tolist()):
            if len(self._heap) == self.count and badness <= self._heap[0][0]:
                continue
            place, row = int(batch.places[i]), int(batch.rows[i])
            pair = Pair(badness, place, row, batch.original[i].cpu(), batch.decoded[i].cpu())
            heapq.heappush(self._heap, (badness, -place, pair))
            if len(self._heap) > self.count:
                heapq.heappop(self._heap)

    def gather(self) -> list[Pair]:
        """Return them, the worst first, on rank 0, none on the others. On all ranks."""
        found = [entry[2] for part in gather_on_main(self._heap) for entry in part]
        return sorted(found, key=lambda pair: (-pair.badness, pair.place))[: self.count]


class PngWriter:
    """Writes PNG files beside the computation. Use `PngWriter.open()`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._jobs: list[Future[None]] = []

    @classmethod
    @contextmanager
    def open(cls) -> Iterator["PngWriter"]:
        """At the end all files are there; what went wrong in writing is raised. After an error the rest is left out."""
        pool = ThreadPoolExecutor(_THREADS)
        try:
            writer = cls(pool)
            yield writer
            writer._wait(0)
        finally:
            pool.shutdown(cancel_futures=True)

    def write(self, image: Tensor, path: Path) -> None:
        """Write uint8 3 x H x W; folders above it are made."""
        self._jobs.append(self._pool.submit(save_png, image, path))
        self._wait(_WAITING)

    def _wait(self, at_most: int) -> None:
        while len(self._jobs) > at_most:
            self._jobs.pop(0).result()


def save_pairs(pairs: Sequence[Pair], folder: Path) -> None:
    """Write FOLDER/00000_original.png, FOLDER/00000_reconstruction.png … and FOLDER/sheet.png."""
    if not pairs:
        return
    with PngWriter.open() as png:
        for pair in pairs:
            png.write(pair.original, folder / f"{pair.place:05d}_original.png")
            png.write(pair.reconstruction, folder / f"{pair.place:05d}_reconstruction.png")
        png.write(contact_sheet(pairs), folder / "sheet.png")


def contact_sheet(pairs: Sequence[Pair], compared: bool = True) -> Tensor:
    """Return uint8 3 x H x W: rows of originals, the reconstructions below, below these the magnified differences.

    `compared` false: rows of reconstructions alone.
    """
    rows: list[Tensor] = []
    for start in range(0, len(pairs), COLUMNS):
        part = pairs[start : start + COLUMNS]
        decoded = torch.stack([pair.reconstruction for pair in part])
        originals = torch.stack([pair.original for pair in part])
        rows += [originals, decoded, difference(originals, decoded)] if compared else [decoded]
    return sheet(rows)
