"""Save originals and their reconstructions as PNG files and contact sheets.

Legend: B batch, H, W image px. Images are uint8 3 x H x W.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.core.distributed import gather_on_main
from src.core.images import difference, save_png, sheet
from src.evaluation.scoring_pass import ScoredBatch

COLUMNS = 8
"""Images per row of a contact sheet."""
_THREADS = 4  # Pillow compresses without the GIL


class Pair(NamedTuple):
    key: float
    """Sort key: larger ones come first."""
    place: int
    """Position in the evaluation order."""
    row: int
    """Row of the data set."""
    original: Tensor
    reconstructions: Tensor
    """uint8 V x 3 x H x W, of the first V variants."""

    @property
    def reconstruction(self) -> Tensor:
        return self.reconstructions[0]


class KeptPairs:
    """Keeps `count` pairs: the first in evaluation order, or the worst by the first variant (largest LPIPS, or lowest PSNR
    without LPIPS). `variants`: number of variants, from the first on, whose reconstructions are kept."""

    def __init__(self, count: int, worst: bool = False, variants: int = 1) -> None:
        self.count, self.worst, self.variants = count, worst, variants
        self._heap: list[tuple[float, int, Pair]] = []  # the next to drop on top

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        batch = variants[0]
        keys = -batch.places
        if self.worst:
            lpips = [value for name, value in batch.values.items() if name.startswith("lpips")]
            keys = lpips[0] if lpips else -batch.values["psnr"]
            keys = keys.where(~keys.isnan(), math.inf)  # nothing is worse
        for i, (key, place) in enumerate(zip(keys.tolist(), batch.places.tolist(), strict=True)):
            if len(self._heap) < self.count or (self.count and key > self._heap[0][0]):
                decoded = torch.stack([variant.decoded[i].cpu() for variant in variants[: self.variants]])
                pair = Pair(key, place, int(batch.rows[i]), batch.original[i].cpu(), decoded)
                heapq.heappush(self._heap, (key, -place, pair))
                if len(self._heap) > self.count:
                    heapq.heappop(self._heap)

    def gather(self) -> list[Pair]:
        """Return the kept pairs in order; none on other ranks than 0. Called on all ranks."""
        found = [entry[2] for part in gather_on_main(self._heap) for entry in part]
        return sorted(found, key=lambda pair: (-pair.key, pair.place))[: self.count]


@contextmanager
def png_writer() -> Iterator[Callable[[Sequence[Tensor], Sequence[Path]], None]]:
    """Yield a function that writes images, uint8 3 x H x W, in the background; its errors surface at the next call or the end."""
    waiting: Iterator[None] = iter(())

    def write(images: Sequence[Tensor], files: Sequence[Path]) -> None:
        nonlocal waiting
        list(waiting)
        waiting = pool.map(save_png, images, files)

    with ThreadPoolExecutor(_THREADS) as pool:
        yield write
        list(waiting)


def save_pairs(pairs: Sequence[Pair], folder: Path) -> None:
    """Write FOLDER/00000_original.png, FOLDER/00000_reconstruction.png … and FOLDER/sheet.png."""
    if not pairs:
        return
    with png_writer() as write:
        for kind in ("original", "reconstruction"):
            write([getattr(pair, kind) for pair in pairs], [folder / f"{pair.place:05d}_{kind}.png" for pair in pairs])
        write([contact_sheet(pairs)], [folder / "sheet.png"])


def contact_sheet(pairs: Sequence[Pair], compared: bool = True) -> Tensor:
    """Return a sheet, uint8 3 x H x W: a row of originals, below it their reconstructions and magnified differences, and so on.

    `compared=False`: only rows of reconstructions.
    """
    rows: list[Tensor] = []
    for start in range(0, len(pairs), COLUMNS):
        part = pairs[start : start + COLUMNS]
        decoded = torch.stack([pair.reconstruction for pair in part])
        originals = torch.stack([pair.original for pair in part])
        rows += [originals, decoded, difference(originals, decoded)] if compared else [decoded]
    return sheet(rows)
