"""Images as `arr_0` of an npz (the format of the ADM evaluation suite), a batch at a time in both directions.

Legend: N images, B batch, H, W image px. On disk uint8 N x H x W x 3, in memory uint8 B x 3 x H x W.
"""

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.files import replacing
from src.metrics.npz import npz_errors

MEMBER = "arr_0.npy"


class ImageNpz:
    """The images of an npz, streamed: memory for one batch, compressed or not. UserError for any other content."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with npz_errors(self.path), zipfile.ZipFile(self.path) as archive:
            if MEMBER not in archive.namelist():
                raise UserError(f"{self.path} has no `arr_0`, only {archive.namelist()}: no npz of images.")
            with archive.open(MEMBER) as file:
                self.shape = self._header(file)  # N H W 3

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        """uint8 B x 3 x H x W; every world_size-th batch from `rank` on, so that ranks together see each image once."""
        count, height, width, _ = self.shape
        with npz_errors(self.path), zipfile.ZipFile(self.path) as archive, archive.open(MEMBER) as file:
            self._header(file)
            for index, start in enumerate(range(0, count, batch_size)):
                size = min(batch_size, count - start)
                wanted = size * height * width * 3
                data = file.read(wanted)
                if len(data) != wanted:
                    raise UserError(f"{self.path} ends after image {start + len(data) * size // wanted} of {count}")
                if index % world_size == rank:
                    images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(size, height, width, 3)
                    yield images.permute(0, 3, 1, 2).contiguous()  # B 3 H W

    def _header(self, file: IO[bytes]) -> tuple[int, int, int, int]:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise UserError(f"{self.path}: `arr_0` has npy version {version}, expected 1.0 or 2.0")
        shape, fortran, dtype = readers[version](file)
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
            raise UserError(
                f"{self.path}: `arr_0` is {dtype} {shape}{' in column order' if fortran else ''}, expected uint8 "
                "images N x H x W x 3 (arrays of Python objects are refused)"
            )
        return shape


class ImageNpzWriter:
    """`with ImageNpzWriter(path, count, H, W) as out: out.write(uint8 B x 3 x H x W)`; any number of batches.

    Holds one batch. The file appears when `count` images have been written; an error, or another number, leaves none.
    """

    def __init__(self, path: str | Path, count: int, height: int, width: int) -> None:
        self.path, self.shape, self.written = Path(path), (count, height, width, 3), 0

    def __enter__(self) -> "ImageNpzWriter":
        with ExitStack() as stack:
            file = stack.enter_context(replacing(self.path))
            archive = stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED))
            self._member = stack.enter_context(archive.open(zipfile.ZipInfo(MEMBER), "w", force_zip64=True))
            header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(self._member, header)
            self._stack = stack.pop_all()
        return self

    def write(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, *self.shape[1:3]):
            raise ValueError(
                f"expected uint8 B x 3 x {self.shape[1]} x {self.shape[2]}, got {images.dtype} {images.shape}"
            )
        self._member.write(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
        self.written += len(images)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self.written != self.shape[0]:
            error = ValueError(f"{self.path}: {self.written} images written, {self.shape[0]} announced")
            self._stack.__exit__(type(error), error, None)
            raise error
        self._stack.__exit__(kind, error, trace)
