"""npz files from strangers: read without ever unpickling, written whole or not at all."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from src.core.errors import UserError

Scalar = TypeVar("Scalar", str, int)


@contextmanager
def npz_errors(path: Path) -> Iterator[None]:
    """Turns what zipfile, zlib and numpy raise on a missing, broken or hostile file into one UserError."""
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
    """An open npz. Arrays of Python objects are refused (they could run code), broken files say so: UserError."""
    path = Path(path)
    with npz_errors(path), np.lib.npyio.NpzFile(path, allow_pickle=False) as archive:
        yield archive


def npz_names(path: str | Path) -> list[str]:
    """The names of the arrays in an npz, e.g. ["mu", "sigma"] or ["arr_0"]."""
    with opened_npz(path) as archive:
        return list(archive.files)


def scalar(archive: np.lib.npyio.NpzFile, name: str, kind: type[Scalar]) -> Scalar | None:
    """One text or whole number of an npz; None where there is none. Other tools may mean something else by the name."""
    if name not in archive.files:
        return None
    array = archive[name]
    value = array.item() if array.size == 1 else None
    return value if isinstance(value, kind) else None


def append_arrays(path: str | Path, values: Mapping[str, str | int]) -> None:
    """Add `values` to the npz at `path`, in place: for a file that nobody else knows of yet."""
    with Path(path).open("r+b") as file:
        with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
            for name, value in values.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                    np.lib.format.write_array(member, np.array(value), allow_pickle=False)
        os.fsync(file.fileno())
