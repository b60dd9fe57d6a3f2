"""Files with one entry per image, written by several processes and put into the order of evaluation at the end.

Every process writes its own part beside the target; rank 0 merges the parts, reading as it goes. Memory: one image. The
parts must lie where rank 0 can read them.

Legend: B batch, H, W image px.
"""

import csv
import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from src.evaluation.passes import ScoredBatch
from src.metrics.image_npz import ImageNpzWriter
from src.metrics.npz import atomic_write
from src.metrics.ranks import is_distributed

FIELDS = ("dataset", "split", "index", "file", "layers", "noise_sigma", "psnr", "ssim", "lpips")


class CsvSpool:
    """One row per image and variant: `FIELDS`."""

    def __init__(self, target: Path, rank: int, world: int) -> None:
        self.target, self.rank, self.world = target, rank, world
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file = _part(target, rank).open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._dataset, self._labels, self._names = ("", ""), [("", "")], None
        self._number = -1

    def begin(self, dataset: str, split: str, labels: Sequence[tuple[str, str]], names: Any) -> None:
        """A data set; `labels` are (layers, sigma) of its variants, `names` gives the file of a row."""
        self._number += 1
        self._dataset, self._labels, self._names = (dataset, split), list(labels), names

    def observe(self, variant: int, batch: ScoredBatch) -> None:
        columns = [batch.values[name].tolist() if name in batch.values else None for name in ("psnr", "ssim", "lpips")]
        for i, (place, row) in enumerate(zip(batch.places.tolist(), batch.rows.tolist(), strict=True)):
            values = ["" if column is None else f"{column[i]:.6g}" for column in columns]
            key = (self._number, place, variant)
            self._writer.writerow([*key, *self._dataset, row, self._names(row), *self._labels[variant], *values])

    def finish(self) -> None:
        """On all ranks; afterwards the target is there."""
        self._file.close()
        _wait_for_all()
        if self.rank:
            return
        parts = [_part(self.target, rank) for rank in range(self.world)]
        with atomic_write(self.target) as out:
            out.write((",".join(FIELDS) + "\n").encode())
            for _, line in heapq.merge(*(_sorted_rows(part) for part in parts)):
                out.write(line)
        for part in parts:
            part.unlink()

    def abandon(self) -> None:
        """After an error: no part stays."""
        self._file.close()
        _part(self.target, self.rank).unlink(missing_ok=True)


def _sorted_rows(part: Path) -> Iterator[tuple[tuple[int, int, int], bytes]]:
    """(key, line without the key). A batch's rows come variant by variant, so they are put in order batch by batch."""
    pending: list[tuple[tuple[int, int, int], bytes]] = []
    with part.open("rb") as file:
        for line in file:
            number, place, variant, rest = line.split(b",", 3)
            key = (int(number), int(place), int(variant))
            if pending and key[2] == 0 and pending[-1][0][2] != 0:
                yield from sorted(pending)
                pending.clear()
            pending.append((key, rest))
            if len(pending) > 1 and key[2] == 0 and pending[-2][0][2] == 0 and len(pending) > _LOOK_BACK:
                yield from pending[:-_LOOK_BACK]
                del pending[:-_LOOK_BACK]
    yield from sorted(pending)


_LOOK_BACK = 0
