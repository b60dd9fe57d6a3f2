"""Convert one shard in a worker process: read the files, skip bad ones, resize if requested, write."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from src.data import crops
from src.data.arrow_writer import UNKNOWN_LABEL, Row, write_json, write_shard
from src.data.convert_scan import Rows
from src.data.decode import BadImage, Decoder, jpeg_orientation

JPEG_QUALITY = 95
MAX_JPEG_SIDE = 65500  # px, libjpeg's limit


@dataclass(frozen=True)
class Settings:
    """Settings that the result depends on; a half-finished conversion resumes only with the same ones.

    resize_shorter_px: null copies every file's bytes. A number re-encodes (JPEG, quality 95, EXIF rotation applied) so
        that the shorter side has exactly that many px, smaller images included; splits other than `train` are always
        copied, because rFID needs the original images as reference.
    max_megapixels: larger images are skipped.
    trust: copy images that are not resized without decoding them; damaged ones then show up in training.
    """

    resize_shorter_px: int | None
    max_megapixels: float
    trust: bool = False


@dataclass(frozen=True)
class Job:
    """One shard to convert."""

    part: Rows
    target: Path
    journal: Path
    settings: Settings
    class_names: Sequence[str] | None


def convert_shard(job: Job) -> int:
    """Write a shard, then the journal entry that marks it done; return the number of files tried."""
    bad: list[dict[str, str]] = []
    rows = write_shard(job.target, _rows(job, bad), job.class_names)
    write_json(job.journal, {"rows": rows, "bad": bad})
    return len(job.part)


def _rows(job: Job, bad: list[dict[str, str]]) -> Iterable[Row]:
    shorter_px, decoder = job.settings.resize_shorter_px, Decoder("apply", job.settings.max_megapixels)
    for entry in job.part.entries():
        try:
            data = entry.read()
            if not job.settings.trust or shorter_px is not None:
                data = encode(data, decoder, shorter_px)
        except BadImage as error:
            bad.append({"file": entry.name, "reason": str(error)})
            continue
        yield Row(data, entry.name, UNKNOWN_LABEL if entry.label is None else entry.label)


def encode(data: bytes, decoder: Decoder, shorter_px: int | None) -> bytes:
    """Return the bytes to store. Every image is decoded, even if its bytes are copied, to detect damage."""
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
    subsampling = "444"  # never coarser than the source
    with suppress(ValueError):  # not a JPEG, or one that only Pillow reads
        subsampling = "420" if simplejpeg.decode_jpeg_header(data)[3] == "420" else "444"
    return simplejpeg.encode_jpeg(np.ascontiguousarray(resized), JPEG_QUALITY, "RGB", subsampling)
