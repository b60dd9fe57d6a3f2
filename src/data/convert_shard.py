"""One shard of a conversion: read the files, find the bad ones, resize where asked, write. Runs in a worker process."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from src.data import crops
from src.data.arrow_writer import Row, write_json, write_shard
from src.data.decode import BadImage, Decoder, jpeg_orientation
from src.data.image_tree import File

JPEG_QUALITY = 95
MAX_FILE_BYTES = 1 << 29  # an encoded image of half a GiB is no photograph
MAX_JPEG_SIDE = 65500  # the longest that libjpeg writes, px


@dataclass(frozen=True)
class Settings:
    """What the result depends on; a half-finished conversion goes on only with the same.

    resize_shorter_px: null copies every file's bytes. A number re-encodes (JPEG, quality 95, EXIF rotation applied) so
        that the shorter side has exactly that many px, smaller images included; the validation split is copied still,
        because rFID's reference images have to be the original ones.
    max_megapixels: larger images are left out.
    """

    resize_shorter_px: int | None
    max_megapixels: float


@dataclass(frozen=True)
class Job:
    """One shard."""

    root: str
    files: list[File]
    target: str
    journal: str
    class_names: list[str]
    settings: Settings


def convert_shard(job: Job) -> int:
    bad: list[dict[str, str]] = []
    rows = write_shard(Path(job.target), _rows(job, bad), job.class_names or None)
    write_json(Path(job.journal), {"rows": rows, "bad": bad})
    return len(job.files)


def _rows(job: Job, bad: list[dict[str, str]]) -> Iterable[Row]:
    decoder = Decoder("apply", job.settings.max_megapixels)
    for file in job.files:
        try:
            data = encode(_read(Path(job.root, file.path)), decoder, job.settings.resize_shorter_px)
        except BadImage as error:
            bad.append({"file": printable(file.path), "reason": str(error)})
            continue
        yield Row(data, printable(file.path), file.label)


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadImage(f"a file of {status.st_size:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"can't be read: {error.strerror or error}") from error


def encode(data: bytes, decoder: Decoder, shorter_px: int | None) -> bytes:
    """The bytes to store. Every image is decoded once in any case: that is what finds the damaged ones."""
    picture = decoder.decode(data)
    is_jpeg = data[:3] == b"\xff\xd8\xff"
    if shorter_px is None:
        return data
    height, width = picture.pixels.shape[:2]
    frame = crops.resized_frame(width, height, shorter_px)
    if is_jpeg and frame == (width, height) and jpeg_orientation(memoryview(data)) == 1:
        return data
    if max(frame) > MAX_JPEG_SIDE:
        raise BadImage(f"{width} x {height} px: too long a strip to resize")
    resized = Image.fromarray(picture.pixels).resize(frame, Image.Resampling.BICUBIC)
    subsampling = "420" if is_jpeg and _subsampling(data) == "420" else "444"  # never coarser than the source
    return simplejpeg.encode_jpeg(np.ascontiguousarray(resized), JPEG_QUALITY, "RGB", subsampling)


def _subsampling(data: bytes) -> str | None:
    try:
        return simplejpeg.decode_jpeg_header(data)[3]
    except ValueError:
        return None


def printable(path: str) -> str:
    """File names that are no valid UTF-8 are written with escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
