"""Write files with one entry per image, in evaluation order, from several processes.

Legend: B batch, V variants, H, W image px.
"""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from src.core.distributed import Process, gather_on_main, wait_for_all
from src.core.files import write_text
from src.data.sources import Source
from src.evaluation.scoring_pass import ScoredBatch
from src.metrics.npz import write_image_npz

FIELDS = ("data_dir", "split", "index", "file", "model", "layers", "noise_sigma")


def as_text(cell: str) -> str:
    """Put an apostrophe before a cell that a spreadsheet would run as a formula: one that starts with = + - @."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


class CsvTable:
    """One row per image and variant: `FIELDS`, then the per-image values by `names`. Keeps only these numbers."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._text = io.StringIO()
        self._writer = csv.writer(self._text, lineterminator="\n")
        self._writer.writerow((*FIELDS, *names))
        self._numbers: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        values = [[batch.values[name].double().cpu() for name in self.names] for batch in variants]
        stacked = torch.stack([torch.stack(columns, dim=1) for columns in values], dim=1)  # B V names
        self._numbers.append((variants[0].places, variants[0].rows, stacked))

    def gather(self, data_dir: str, split: str, source: Source, labels: Sequence[tuple[str, str, str]]) -> None:
        """Collect a finished data set on rank 0. `labels`: (model, layers, sigma) of each variant. Called on all ranks."""
        parts = [batch for part in gather_on_main(self._numbers) for batch in part]
        self._numbers = []
        if not parts:
            return
        places, rows, values = (torch.cat(column) for column in zip(*parts, strict=True))
        for i in places.argsort().tolist():
            row = int(rows[i])
            for label, numbers in zip(labels, values[i].tolist(), strict=True):
                figures = (f"{number:.6g}" for number in numbers)
                self._writer.writerow((as_text(data_dir), split, row, as_text(source.name(row)), *label, *figures))

    def write(self, target: Path) -> None:
        """Write the file. Called on rank 0."""
        write_text(target, self._text.getvalue())


@contextmanager
def image_stack(target: Path, image_size: int, process: Process, originals: bool = False) -> Iterator["ImageStack"]:
    """Open a stack of images that becomes an npz. All ranks write to one temporary file next to `target`.

    It is unlinked as soon as all ranks have opened it, so that a killed process leaves nothing behind; on several nodes,
    at the end. It is not memory-mapped: on a network file system, the maps of two nodes can differ.
    """
    beside = target.with_name(f".{target.name}.images")
    one_node = int(os.environ.get("LOCAL_WORLD_SIZE", process.world)) == process.world
    try:
        if process.main:
            target.parent.mkdir(parents=True, exist_ok=True)
            beside.touch()
        wait_for_all()
        with beside.open("r+b") as file:
            wait_for_all()
            if process.main and one_node and os.name == "posix":
                beside.unlink()
            yield ImageStack(file, target, image_size, process, originals)
    finally:
        if process.main:
            beside.unlink(missing_ok=True)


class ImageStack:
    """Writes `arr_0` of an npz: reconstructions of the first variant, or originals. Open it with `image_stack`."""

    def __init__(self, file: IO[bytes], target: Path, image_size: int, process: Process, originals: bool) -> None:
        self._file, self.target, self.size, self.process, self.originals = file, target, image_size, process, originals
        self._entry = 3 * image_size**2
        self._places: list[Tensor] = []

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        self.write(variants[0].places, variants[0].original if self.originals else variants[0].decoded)

    def write(self, places: Tensor, images: Tensor) -> None:
        """Write images, uint8 B x 3 x H x W, at their positions (B,) in the evaluation order."""
        for place, image in zip(places.tolist(), images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            self._file.seek(place * self._entry)
            self._file.write(image.tobytes())
        self._file.flush()
        self._places.append(places)

    def finish(self, facts: Mapping[str, str | int] | None = None) -> int:
        """Write the npz, without missing images and with `facts`; return the number of images. Called on all ranks."""
        parts = [places for part in gather_on_main(self._places) for places in part]
        order = torch.cat(parts).sort().values.tolist() if parts else []
        if self.process.main:
            write_image_npz(self.target, (len(order), self.size, self.size, 3), map(self._read, order), facts or {})
        return len(order)

    def _read(self, place: int) -> bytes:
        self._file.seek(place * self._entry)
        return self._file.read(self._entry)
