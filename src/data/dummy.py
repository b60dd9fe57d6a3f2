"""Generate sample images without a download: smooth backgrounds, shapes and soft stripes, identical on every machine.

Their class is the colour channel with the largest mean, which is visible in any encoder's latents. They are easy to learn
(saturated colours, large structures, no noise): a small decoder trained for a minute gains far more than 10 dB on new ones.
"""

import logging
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from src.core import files
from src.core import random_streams as stream
from src.data.arrow_writer import Row, shard_name, write_metadata, write_shard

log = logging.getLogger(__name__)

SHAPES = ("disc", "box", "triangle", "ring")
CLASSES = ("red", "green", "blue")
# Folder under the project root: (number of images, shards). The guide's 16 / 4 split needs 20; two ranks of batch 8
# with `limit_train_batches: 0.1` need 160 training images for one step, plus held-out ones.
DATASETS = {"data/dummy_dataset_hf": (288, 2), "data/test_hf": (20, 1), "data/dummy_text_hf": (96, 1)}
SIDES_PX = (160, 400)
GREY_SHARE = 0.1
TEXT_PX = 160


def ensure(data_dir: Path) -> bool:
    """Generate the project's sample dataset if `data_dir` is its path and doesn't exist yet. True if generated."""
    for place, (count, shards) in DATASETS.items():
        if data_dir.resolve() == (files.PROJECT_ROOT / place).resolve() and not data_dir.exists():
            log.info("Generating %d sample images in %s", count, data_dir)
            return write(data_dir, count, shards, text=place.endswith("text_hf"))
    return False


def write(folder: Path, count: int, shards: int = 1, text: bool = False) -> bool:
    """Write `count` sample images, or images of text, as a Hugging Face dataset, atomically. False: another process was first."""
    classes = None if text else CLASSES
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        names = [shard_name(i, shards) for i in range(shards)]
        for name, indices in zip(names, np.array_split(np.arange(count), shards), strict=True):
            write_shard(temporary / name, map(_text_row if text else _row, indices.tolist()), classes)
        write_metadata(temporary, names, classes, "train")
        try:
            os.rename(temporary, folder)
        except OSError:
            if folder.exists():
                return False
            raise
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def jpeg(index: int) -> bytes:
    """Encode sample image `index` as a JPEG file; one in ten is greyscale."""
    return _row(index).data


def _row(index: int) -> Row:
    """Generate sample image `index` and its class; a greyscale one is of the first class."""
    draws = stream.generator(0, stream.Purpose.DUMMY_DATA, 0, index)
    pixels, name = picture(draws, SHAPES[index % len(SHAPES)]), f"{index:05d}.jpg"
    if draws.random() < GREY_SHARE:
        grey = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        return Row(simplejpeg.encode_jpeg(np.ascontiguousarray(grey), 92, "GRAY", "Gray"), name, 0)
    label = int(pixels.sum((0, 1), np.int64).argmax())
    return Row(simplejpeg.encode_jpeg(pixels, 92, "RGB", "420"), name, label)


def _text_row(index: int) -> Row:
    """Render lines of letters and digits, dark on light: a decoder trained only on photographs reconstructs them badly."""
    draws = stream.generator(0, stream.Purpose.DUMMY_DATA, 1, index)
    font, scale = ImageFont.load_default_imagefont(), int(draws.integers(1, 4))
    small = Image.new("L", (TEXT_PX // scale, TEXT_PX // scale), int(draws.integers(200, 256)))
    pen, ink = ImageDraw.Draw(small), int(draws.integers(0, 80))
    for y in range(4, small.height - 11, 14):
        letters = draws.choice(
            list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789    "), small.width // 6
        )
        pen.text((4, y), "".join(letters), fill=ink, font=font)
    pixels = np.asarray(small.resize((TEXT_PX, TEXT_PX), Image.Resampling.NEAREST).convert("RGB"))
    return Row(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 92, "RGB", "444"), f"text-{index:05d}.jpg", -1)


def picture(draws: np.random.Generator, shape: str) -> np.ndarray:
    """Draw a sample image: uint8 RGB, H x W x 3, both sides within `SIDES_PX`."""
    width, height = (int(side) for side in draws.integers(SIDES_PX[0], SIDES_PX[1] + 1, size=2))
    image = Image.fromarray(_background(draws, width, height))
    for _ in range(int(draws.integers(2, 5))):
        _draw(image, draws, shape)
    return np.asarray(image.filter(ImageFilter.BoxBlur(1)))


def _background(draws: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draw a gradient between two colours with soft stripes across it."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(width, height)
    angle, stripes, turn = (float(v) for v in draws.uniform((0, 2, 0), (2 * np.pi, 7, 2 * np.pi)))
    along = np.cos(angle) * x + np.sin(angle) * y
    along = (along - along.min()) / max(float(along.max() - along.min()), 1e-6)
    wave = np.sin(2 * np.pi * stripes * (np.cos(turn) * x + np.sin(turn) * y))
    mix = (along + 0.08 * wave)[:, :, None]
    first, second = (np.array(_colour(draws), np.float32) for _ in range(2))
    return np.clip(first + (second - first) * mix, 0, 255).astype(np.uint8)


def _draw(image: Image.Image, draws: np.random.Generator, shape: str) -> None:
    short = min(image.size)
    radius = float(draws.uniform(0.12, 0.35)) * short
    cx, cy = (float(draws.uniform(0.1, 0.9)) * side for side in image.size)
    box = (cx - radius, cy - radius, cx + radius, cy + radius * float(draws.uniform(0.6, 1)))
    colour = _colour(draws)
    pen = ImageDraw.Draw(image)
    if shape == "disc":
        pen.ellipse(box, fill=colour)
    elif shape == "box":
        pen.rounded_rectangle(box, radius=radius / 5, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=max(6, int(radius / 3)))
    else:
        pen.regular_polygon((cx, cy, radius), 3, rotation=int(draws.integers(0, 120)), fill=colour)


def _colour(draws: np.random.Generator) -> tuple[int, int, int]:
    """Draw a saturated colour: one channel high, one low, one anywhere."""
    values = np.array((draws.uniform(180, 255), draws.uniform(0, 80), draws.uniform(0, 255)))
    red, green, blue = (int(v) for v in draws.permutation(values))
    return red, green, blue
