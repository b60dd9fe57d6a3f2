"""Originals beside their reconstructions, as PNG pairs and contact sheets.

Legend: B batch, H, W image px. Images are uint8 3 x H x W.
"""

import heapq
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.core.processes import gather_on_main
from src.core.sheets import difference, save_png, sheet
from src.evaluation.scoring_pass import ScoredBatch

COLUMNS = 8
"""Images in a row of a contact sheet."""
_WRITERS = 4  # Pillow compresses outside of Python's lock


class Pair(NamedTuple):
    place: int
    """In the evaluation order."""
    row: int
    """Of the data set."""
    value: float
    """By which the worst are found; 0 where nobody asks."""
    original: Tensor
    reconstruction: Tensor


class FirstPairs:
    """Keeps the pairs of the first `count` images of the evaluation order (of the first variant)."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: list[Pair] = []

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        batch = variants[0]
        for i, (place, row) in enumerate(zip(batch.places.tolist(), batch.rows.tolist(), strict=True)):
            if place < self.count:
                self._kept.append(Pair(place, row, 0.0, batch.original[i].cpu(), batch.decoded[i].cpu()))

    def gather(self) -> list[Pair]:
        """In their order on rank 0, empty on the others. On all ranks."""
        return sorted((pair for part in gather_on_main(self._kept) for pair in part), key=lambda pair: pair.place)


class WorstPairs:
    """Keeps the `count` worst pairs (of the first variant): largest LPIPS, else smallest PSNR."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._heap: list[tuple[float, int, Pair]] = []  # the best of the worst on top

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        batch = variants[0]
        badness = batch.values["lpips"] if "lpips" in batch.values else -batch.values["psnr"]
        for i, value in enumerate(badness.tolist()):
            if len(self._heap) == self.count and value <= self._heap[0][0]:
                continue
            place, row = int(batch.places[i]), int(batch.rows[i])
            pair = Pair(place, row, value, batch.original[i].cpu(), batch.decoded[i].cpu())
            heapq.heappush(self._heap, (value, -place, pair))
            if len(self._heap) > self.count:
                heapq.heappop(self._heap)

    def gather(self) -> list[Pair]:
        """Worst first on rank 0, empty on the others. On all ranks."""
        found = [entry[2] for part in gather_on_main(self._heap) for entry in part]
        return sorted(found, key=lambda pair: (-pair.value, pair.place))[: self.count]


def save_pairs(pairs: Sequence[Pair], folder: Path) -> None:
    """FOLDER/00000_original.png, FOLDER/00000_reconstruction.png … and FOLDER/sheet.png."""
    if not pairs:
        return
    jobs = [(pair.original, folder / f"{pair.place:05d}_original.png") for pair in pairs]
    jobs += [(pair.reconstruction, folder / f"{pair.place:05d}_reconstruction.png") for pair in pairs]
    jobs.append((contact_sheet(pairs), folder / "sheet.png"))
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(lambda job: save_png(*job), jobs))


def contact_sheet(pairs: Sequence[Pair]) -> Tensor:
    """Rows of originals, below them the reconstructions, below these the magnified differences: uint8 3 x H x W."""
    rows: list[Tensor] = []
    for start in range(0, len(pairs), COLUMNS):
        part = pairs[start : start + COLUMNS]
        originals, decoded = (
            torch.stack([getattr(pair, name) for pair in part]) for name in ("original", "reconstruction")
        )
        rows += [originals, decoded, difference(originals, decoded)]
    return sheet(rows)
