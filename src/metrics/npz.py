"""npz files, those of others included: read without ever unpickling, written atomically.

Images are `arr_0`, the format of the ADM evaluation suite. Legend: N images, B batch, H, W image px; on disk uint8
N x H x W x 3, in memory uint8 B x 3 x H x W.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.files import replacing

IMAGES = "arr_0.npy"
Scalar = TypeVar("Scalar", str, int)


@contextmanager
def npz_errors(path: Path) -> Iterator[None]:
    """Turn what zipfile, zlib and numpy raise on a missing, broken or hostile file into one UserError."""
    if not path.is_file():
        raise UserError(f"No such file: {path}. Expected an npz with `mu` and `sigma`, or with images in `arr_0`.")
    try:
        yield
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) can't be read as npz: {error}. Files with pickled objects are "
            "refused; a file that was cut short must be copied again."
        ) from error


@contextmanager
def opened_npz(path: str | Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an npz. Arrays of Python objects are refused (they could run code), broken files say so: UserError."""
    path = Path(path)
    with npz_errors(path), np.lib.npyio.NpzFile(path, allow_pickle=False) as archive:
        yield archive


def scalar(archive: np.lib.npyio.NpzFile, name: str, kind: type[Scalar]) -> Scalar | None:
    """Return one text or whole number of an npz; None where there is none, or others mean something else by it."""
    array = archive[name] if name in archive.files else np.empty(0)
    value = array.item() if array.size == 1 else None
    return value if isinstance(value, kind) else None


class ImageNpz:
    """The images of an npz, streamed: memory for one batch, compressed or not. UserError for any other content."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with npz_errors(self.path), zipfile.ZipFile(self.path) as archive:
            if IMAGES not in archive.namelist():
                raise UserError(f"{self.path} has no `arr_0`, only {archive.namelist()}: no npz of images.")
            with archive.open(IMAGES) as file:
                self.shape = self._header(file)  # N H W 3

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        """Yield uint8 B x 3 x H x W: every world_size-th batch from `rank` on, so that ranks share the images."""
        count, height, width, _ = self.shape
        with npz_errors(self.path), zipfile.ZipFile(self.path) as archive, archive.open(IMAGES) as file:
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


def write_image_npz(
    path: str | Path, shape: tuple[int, int, int, int], images: Iterable[bytes], facts: Mapping[str, str | int]
) -> None:
    """Write images as `arr_0`, and `facts` beside it; memory for one of `images`.

    Args:
        shape: N, H, W, 3.
        images: the bytes of the N images, H x W x 3 each, cut in any way.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo(IMAGES), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for part in images:
                member.write(part)
        for name, value in facts.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, np.array(value), allow_pickle=False)
