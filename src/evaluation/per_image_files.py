"""Files with an entry per image, written by several processes and put into the order of evaluation at the end.

Every process writes its own part beside the target, where rank 0 must be able to read it; rank 0 merges the parts,
reading as it goes. Memory: one image.

Legend: B batch, H, W image px.
"""

import csv
import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from src.core.distributed import is_distributed
from src.core.files import replacing
from src.evaluation.scoring_pass import ScoredBatch
from src.metrics.image_npz import ImageNpzWriter
from src.metrics.npz import append_arrays

FIELDS = ("data_dir", "split", "index", "file", "layers", "noise_sigma", "psnr", "ssim")
_PLACE = np.dtype("<i8")


class CsvSpool:
    """One row of `FIELDS` per image and variant; `lpips` names a last column for it (perhaps untrained), None: none."""

    def __init__(self, target: Path, lpips: str | None, rank: int, world: int) -> None:
        self.columns = (*FIELDS, *([lpips] if lpips else []))
        self._values = ("psnr", "ssim", *(["lpips"] if lpips else []))
        self.target, self.world, self.rank = target, world, rank
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file = _part(target, rank).open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._number = -1

    def begin(self, data_dir: str, split: str, labels: Sequence[tuple[str, str]], name: Callable[[int], str]) -> None:
        """A data set follows; `labels` are (layers, sigma) of its variants, `name` gives the file of a row."""
        self._number += 1
        self._set, self._labels, self._name = (data_dir, split), labels, name

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        first = variants[0]
        columns = [[_column(batch, name) for name in self._values] for batch in variants]
        for i, (place, row) in enumerate(zip(first.places.tolist(), first.rows.tolist(), strict=True)):
            for label, values in zip(self._labels, columns, strict=True):
                self._writer.writerow(
                    [self._number, place, *self._set, row, self._name(row), *label, *(column[i] for column in values)]
                )

    def finish(self) -> None:
        """On all ranks; then the target is there."""
        self._file.close()
        _wait_for_all()
        if self.rank == 0:
            parts = [_part(self.target, rank) for rank in range(self.world)]
            with replacing(self.target) as out:
                out.write((",".join(self.columns) + "\n").encode())
                for _, line in heapq.merge(*map(_keyed_lines, parts), key=lambda entry: entry[0]):
                    out.write(line)
            _remove(parts)

    def abandon(self) -> None:
        """After an error: this rank's part goes."""
        self._file.close()
        _remove([_part(self.target, self.rank)])


class NpzSpool:
    """Reconstructions (of the first variant) as `arr_0` of an npz, the format of the ADM evaluation suite."""

    def __init__(self, target: Path, image_size: int, rank: int, world: int) -> None:
        self.target, self.size, self.rank, self.world = target, image_size, rank, world
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file = _part(target, rank).open("wb")

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        self.write(variants[0].places, variants[0].decoded)

    def write(self, places: Tensor, images: Tensor) -> None:
        """Places in the whole (B,) and uint8 B x 3 x H x W, in ascending order on each rank."""
        for place, image in zip(places.tolist(), images.cpu(), strict=True):
            self._file.write(np.array(place, _PLACE).tobytes())
            self._file.write(image.contiguous().numpy().tobytes())

    def finish(self, facts: Mapping[str, str | int] | None = None) -> int:
        """On all ranks; then the target is there. The number of images (0 on other ranks than the first). `facts` go
        into the npz beside `arr_0`."""
        self._file.close()
        _wait_for_all()
        if self.rank:
            return 0
        parts = [_part(self.target, rank) for rank in range(self.world)]
        entry = _PLACE.itemsize + 3 * self.size**2
        count = sum(part.stat().st_size for part in parts) // entry
        whole = _part(self.target, self.world)  # after the last rank's
        try:
            with ImageNpzWriter(whole, count, self.size, self.size) as out:
                images = (_images(part, self.size, entry) for part in parts)
                for _, image in heapq.merge(*images, key=lambda pair: pair[0]):
                    out.write(image[None])
            if facts:
                append_arrays(whole, facts)
            os.replace(whole, self.target)
        finally:
            whole.unlink(missing_ok=True)
        _remove(parts)
        return count

    def abandon(self) -> None:
        self._file.close()
        _remove([_part(self.target, self.rank)])


def _column(batch: ScoredBatch, name: str) -> list[str]:
    return [f"{value:.6g}" for value in batch.values[name].tolist()]


def _keyed_lines(part: Path) -> Iterator[tuple[tuple[int, int], bytes]]:
    """((data set, place), the line without them): lines of one image stay in their order. A name with a line break in
    it is quoted over several lines; they are kept together."""
    with part.open("rb") as file:
        pending = b""
        for line in file:
            pending += line
            if pending.count(b'"') % 2 == 0:
                number, place, rest = pending.split(b",", 2)
                yield (int(number), int(place)), rest
                pending = b""


def _images(part: Path, size: int, entry: int) -> Iterator[tuple[int, Tensor]]:
    with part.open("rb") as file:
        while len(data := file.read(entry)) == entry:
            place = int(np.frombuffer(data[: _PLACE.itemsize], _PLACE)[0])
            yield place, torch.frombuffer(bytearray(data[_PLACE.itemsize :]), dtype=torch.uint8).view(3, size, size)


def _part(target: Path, rank: int) -> Path:
    return target.with_name(f".{target.name}.rank{rank}.part")


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _wait_for_all() -> None:
    if is_distributed():
        dist.barrier()
