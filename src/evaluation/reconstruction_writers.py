"""Reconstructions as PNG files, written beside the computation.

Legend: B batch, H, W image px. Images are uint8 B x 3 x H x W.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from src.core.sheets import save_png
from src.evaluation.scoring_pass import ScoredBatch

_THREADS = 4  # Pillow compresses outside of Python's lock
_WAITING = 256  # pictures in memory at most


class PngWriter:
    """FOLDER/NAME.png for each image."""

    def __init__(self, folder: Path, name: Callable[[int], str]) -> None:
        self.folder, self.name = folder, name
        self._pool = ThreadPoolExecutor(_THREADS)
        self._jobs: list[Future[None]] = []

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        batch = variants[0]
        for row, image in zip(batch.rows.tolist(), batch.decoded.cpu(), strict=True):
            self._jobs.append(self._pool.submit(save_png, image, self.folder / f"{self.name(row)}.png"))
        while len(self._jobs) > _WAITING:
            self._jobs.pop(0).result()

    def finish(self) -> None:
        """Raises what went wrong in writing."""
        for job in self._jobs:
            job.result()
        self._pool.shutdown()

    def abandon(self) -> None:
        self._pool.shutdown(cancel_futures=True)
