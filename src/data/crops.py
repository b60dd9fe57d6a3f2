"""Choose a square crop of an image and resize it. Pure functions of sizes and two random numbers.

Legend: S side of the square in px, W x H an image or frame in px. Pixels are uint8 0..255, H x W x 3, RGB.

The published transforms resize the whole image, then crop. Here only the crop, mapped back to the source, is resized, in
one pass: the same geometry, less arithmetic. Sources: torchvision `Resize(int)`, `RandomCrop`, `CenterCrop` (training);
guided-diffusion's centre crop, "ADM" (evaluation).
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from src.data.decode import Picture

# Bicubic reads 2 source px (2 * scale when shrinking) beyond the box; the margin is for rounding.
KERNEL_REACH = 2
MARGIN_PX = 2
# Without a limit, a 10000 x 1 px strip would be resized to a width of 2.5 million px before the crop.
MAX_ASPECT = 32


class Window(NamedTuple):
    """A square in a resized image, px."""

    frame_width: int
    frame_height: int
    left: int
    top: int
    size: int


def default_shorter_px(size: int) -> int:
    """Return the published shorter side before a random crop: 1.5 times the crop (256 -> 384)."""
    return int(1.5 * size)


def resized_frame(width: int, height: int, shorter_px: int) -> tuple[int, int]:
    """Return (width, height) with the shorter side resized to `shorter_px`, the longer one rounded down as in torchvision."""
    if width <= height:
        return shorter_px, int(shorter_px * height / width)
    return int(shorter_px * width / height), shorter_px


def random_window(width: int, height: int, size: int, shorter_px: int, u: float, v: float) -> Window:
    """Choose a square from two draws u, v in [0, 1); every integer offset is equally likely."""
    frame_width, frame_height = resized_frame(width, height, shorter_px)
    left = int(u * (frame_width - size + 1))
    top = int(v * (frame_height - size + 1))
    return Window(frame_width, frame_height, left, top, size)


def center_window(width: int, height: int, size: int) -> Window:
    """Choose the centre square with the shorter side resized to `size`, as RAEv2 does."""
    frame_width, frame_height = resized_frame(width, height, size)
    left, top = round((frame_width - size) / 2), round((frame_height - size) / 2)
    return Window(frame_width, frame_height, left, top, size)


def cut(picture: Picture, window: Window) -> np.ndarray:
    """Return the window's pixels, uint8 S x S x 3, resized bicubically with antialiasing."""
    scale_x = picture.width / picture.reduction / window.frame_width
    scale_y = picture.height / picture.reduction / window.frame_height
    x0, x1 = window.left * scale_x, (window.left + window.size) * scale_x
    y0, y1 = window.top * scale_y, (window.top + window.size) * scale_y
    if scale_x == 1 and scale_y == 1:  # nothing to resize, as after `create_hf_test_data.py --resize_shorter`
        return picture.pixels[window.top : window.top + window.size, window.left : window.left + window.size]
    rows, top = _neighbourhood(y0, y1, scale_y, picture.pixels.shape[0])
    columns, left = _neighbourhood(x0, x1, scale_x, picture.pixels.shape[1])
    part = Image.fromarray(np.ascontiguousarray(picture.pixels[rows, columns]))
    box = (x0 - left, y0 - top, min(x1 - left, part.width), min(y1 - top, part.height))
    return np.asarray(part.resize((window.size, window.size), Image.Resampling.BICUBIC, box=box))


def adm_center_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return the evaluation crop, uint8 S x S x 3, bit-equal to the published one: halve while the shorter side is at least
    2 * size, resize it to `size` (bicubic), crop the centre. `pixels` must come from `decode` without reduction. Images with
    an aspect ratio above 32 are first trimmed to it at both ends."""
    image = Image.fromarray(_trim_strip(pixels))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def whole(pixels: np.ndarray, size: int, pad: bool) -> np.ndarray:
    """Resize the whole image to uint8 S x S x 3, bicubic. `pad`: fit the longer side and fill the rest with the edge colours;
    else resize both sides, without keeping the aspect ratio."""
    height, width = pixels.shape[:2]
    scale = size / max(height, width)
    wanted = (max(1, round(width * scale)), max(1, round(height * scale))) if pad else (size, size)
    image = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(wanted, Image.Resampling.BICUBIC))
    top, left = (size - image.shape[0]) // 2, (size - image.shape[1]) // 2
    spans = ((top, size - image.shape[0] - top), (left, size - image.shape[1] - left), (0, 0))
    return np.pad(image, spans, mode="edge")


def _trim_strip(pixels: np.ndarray) -> np.ndarray:
    longest = MAX_ASPECT * min(pixels.shape[:2])
    top, left = (max(0, (side - longest) // 2) for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + longest, left : left + longest])


def _neighbourhood(start: float, stop: float, scale: float, length: int) -> tuple[slice, int]:
    """Return the slice of source px that resizing [start, stop) reads, and its start."""
    reach = KERNEL_REACH * max(scale, 1.0) + MARGIN_PX
    first = max(0, math.floor(start - reach))
    return slice(first, min(length, math.ceil(stop + reach))), first
