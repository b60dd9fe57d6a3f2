"""Read npz files, also third-party ones, without unpickling, and write them atomically.

Images are in `arr_0`, the format of the ADM evaluation suite. Legend: N images, B batch, H, W image px; on disk uint8
N x H x W x 3, in memory uint8 B x 3 x H x W.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.files import replacing
from src.core.json_files import check_json

IMAGES, LATENTS = "arr_0.npy", "latents.npy"
STREAMED = (IMAGES, LATENTS)
"""Arrays that are read in batches of rows; others are read whole."""
LARGEST_ARRAY, LARGEST_ROW = 2**30, 2**28
"""Limits in bytes, since a small file can unpack to any size: 32 times Inception's covariance; an image of 9,459 x 9,459 px."""
Scalar = TypeVar("Scalar", str, int)


@contextmanager
def opened_npz(path: str | Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an npz. A missing, broken or malicious file raises UserError, whatever zipfile, zlib or numpy raise.

    Arrays of Python objects are rejected: they could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No such file: {path}. Expected an npz with `mu` and `sigma`, or with images in `arr_0`.")
    try:
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as archive:
            for info in archive.zip.infolist():
                _check_size(archive.zip, info)
            yield archive
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) can't be read as npz: {error}. Files with pickled objects are "
            "refused; a file that was cut short must be copied again."
        ) from error


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read an npy header: shape, whether in Fortran order, dtype. Leaves `file` at the data. Raises ValueError."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"npy version {version}, expected 1.0 or 2.0")
    return readers[version](file)


def _check_size(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raise ValueError if an array is too large, or not of its header's size: numpy would allocate what the header states."""
    if info.filename not in STREAMED and info.file_size > LARGEST_ARRAY:
        raise ValueError(f"`{info.filename}` unpacks to {info.file_size:,} bytes, more than {LARGEST_ARRAY:,}")
    if info.filename.endswith(".npy"):
        with archive.open(info) as file:
            shape, _, dtype = read_header(file)
            announced, actual = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if announced != actual and not dtype.hasobject:  # object arrays are rejected when they are read
            raise ValueError(f"`{info.filename}` announces {announced:,} bytes and has {actual:,}")


def scalar(archive: np.lib.npyio.NpzFile, name: str, kind: type[Scalar]) -> Scalar | None:
    """Return a string or integer from an npz; None if it is missing or of another type (another tool's)."""
    array = archive[name] if name in archive.files else np.empty(0)
    value = array.item() if array.size == 1 else None
    return value if isinstance(value, kind) else None


class NpzRows:
    """One array of an npz, streamed in batches of rows: memory for one batch, even if compressed. UserError if it doesn't fit."""

    member: str
    dtype: type[np.generic]
    content: str
    last: int | None = None
    """Length of the last of the four axes; None: any."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        name = self.member.removesuffix(".npy")
        with opened_npz(self.path) as archive:
            if name not in archive.files:
                raise UserError(f"{self.path} has no `{name}`, only {archive.files}: expected {self.content}.")
            with archive.zip.open(self.member) as file:
                self.shape, by_columns, dtype = read_header(file)
            if dtype != self.dtype or by_columns or len(self.shape) != 4 or self.last not in (None, self.shape[3]):
                raise UserError(
                    f"{self.path}: `{name}` is {dtype} {self.shape}{' in column order' if by_columns else ''}, expected "
                    f"{self.content} (arrays of Python objects are refused)"
                )
            if (row := math.prod(self.shape[1:]) * dtype.itemsize) > LARGEST_ROW:
                raise ValueError(f"a row of {row:,} bytes, more than {LARGEST_ROW:,}")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches (row indices (B,), rows): every `world_size`-th, starting at `rank`, so that ranks share them."""
        count, *entry = self.shape
        with opened_npz(self.path) as archive, archive.zip.open(self.member) as file:
            read_header(file)
            for index, start in enumerate(range(0, count, batch_size)):
                size = min(batch_size, count - start)
                data = file.read(size * math.prod(entry) * np.dtype(self.dtype).itemsize)
                if index % world_size == rank:
                    rows = np.frombuffer(bytearray(data), self.dtype).reshape(size, *entry)
                    yield torch.arange(start, start + size), torch.from_numpy(rows)


class ImageNpz(NpzRows):
    """The images `arr_0` of an npz; batches are uint8 B x 3 x H x W."""

    member, dtype, content, last = IMAGES, np.uint8, "uint8 images N x H x W x 3", 3

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        for places, rows in super().batches(batch_size, rank, world_size):
            yield places, rows.permute(0, 3, 1, 2).contiguous()


class LatentNpz(NpzRows):
    """The normalised latents written by `src/sample.py --latents`; batches are float32 B x C x h x w."""

    member, dtype, content = LATENTS, np.float32, "float32 latents N x C x h x w"
    scale = "normalized"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        with opened_npz(path) as archive:
            facts = json.loads(scalar(archive, "settings", str) or "{}")
            if not isinstance(facts, dict):
                raise ValueError("its `settings` are not a JSON object")
        check_json(facts, self.path, "Sample them again.", encoder=(dict[str, Any], {}), statistics=(str | None, None))
        self.about: dict[str, Any] = facts
        """The file's settings: `encoder`, the identity of the encoder, `statistics`, the digest of the latent statistics, and
        others; empty if the file has none."""

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        for places, rows in super().batches(batch_size, rank, world_size):
            if not rows.isfinite().all():
                raise UserError(f"{self.path} holds latents that are NaN or infinite. Sample them again.")
            yield places, rows


def write_image_npz(
    path: str | Path, shape: tuple[int, int, int, int], images: Iterable[bytes], facts: Mapping[str, str | int]
) -> None:
    """Write images as `arr_0`, and `facts` as scalars; memory for one item of `images`.

    Args:
        shape: N, H, W, 3.
        images: the bytes of the N images, H x W x 3 each, split at any point.
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
