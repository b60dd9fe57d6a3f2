"""Crops match the published transforms, reimplemented here with Pillow alone."""

import functools
import io

import numpy as np
import pytest
from PIL import Image

from src.core import random_streams as stream
from src.core.errors import UserError
from src.data import crops, dummy
from src.data.dataset import TrainTransform
from src.data.decode import Decoder, Picture

SIZES = [(500, 375), (375, 500), (384, 384), (500, 333), (1601, 1203), (68, 121), (385, 384), (4000, 60)]
DECODER = Decoder("apply", 80)
# Largest mean difference from the two steps over an image, in levels of 255. One pass rounds once, two steps round twice.
ONE_PASS, SCALED_DECODE = 0.3, 2.0


@functools.cache
def natural(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return noise whose amplitude falls with frequency, as in photographs, over the shapes of a dummy image."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(dummy.picture(rng, "box"))
    image = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), float)
    for octave in range(1, 7):
        grid = rng.normal(0, 2.0 ** (6 - octave), (2**octave + 1, 2**octave + 1)).astype(np.float32)
        layer = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        image = image + np.asarray(layer)[:, :, None]
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def published_training(image: Image.Image, size: int, shorter: int, u: float, v: float) -> np.ndarray:
    """Apply torchvision's Resize(shorter, bicubic, antialias), then RandomCrop(size) at (u, v) of its offset range."""
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    new = (shorter, int(shorter * long / short))
    frame_w, frame_h = new if w <= h else new[::-1]
    image = image.resize((frame_w, frame_h), Image.Resampling.BICUBIC)
    top, left = int(v * (frame_h - size + 1)), int(u * (frame_w - size + 1))
    return np.asarray(image)[top : top + size, left : left + size]


def published_evaluation(image: Image.Image, size: int) -> np.ndarray:
    """Apply the centre crop of guided-diffusion, written from its description."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize(tuple(round(side * factor) for side in image.size), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("wh", SIZES, ids=str)
@pytest.mark.parametrize("size", [256, 64])
def test_one_pass_equals_two_steps(wh: tuple[int, int], size: int) -> None:
    image = natural(*wh)
    picture = Picture(np.asarray(image), *wh, 1)
    shorter = crops.default_shorter_px(size)
    for u, v in ((0, 0), (0.999999, 0.999999), (0.31, 0.77)):
        window = crops.random_window(*wh, size, shorter, u, v)
        got = crops.cut(picture, window)
        assert got.shape == (size, size, 3)
        assert difference(got, published_training(image, size, shorter, u, v)) < ONE_PASS


@pytest.mark.parametrize("wh", SIZES, ids=str)
def test_cropping_the_source_before_the_resize_changes_nothing(wh: tuple[int, int]) -> None:
    """Borders included, even in noise. Without black and white: Pillow clips between its two passes, whose order may
    depend on the sizes."""
    image = Image.fromarray(np.random.default_rng(0).integers(80, 176, (wh[1], wh[0], 3), dtype=np.uint8))
    for u, v in ((0, 0), (0.37, 0.61), (0.999999, 0.999999)):
        window = crops.random_window(*wh, 256, 384, u, v)
        x, y = wh[0] / window.frame_width, wh[1] / window.frame_height
        box = (window.left * x, window.top * y, (window.left + 256) * x, (window.top + 256) * y)
        box = (*box[:2], min(box[2], wh[0]), min(box[3], wh[1]))
        whole = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC, box=box))
        got = crops.cut(Picture(np.asarray(image), *wh, 1), window)
        assert np.abs(got.astype(int) - whole.astype(int)).max() <= 2  # box origins differ in float32


@pytest.mark.parametrize("wh", [(1601, 1203), (1600, 1065), (820, 769)], ids=str)
def test_scaled_decode_stays_close(wh: tuple[int, int]) -> None:
    out = io.BytesIO()
    natural(*wh).save(out, "JPEG", quality=92)
    whole = Image.open(io.BytesIO(out.getvalue())).convert("RGB")
    picture = DECODER.decode(out.getvalue(), min_shorter_px=384)
    assert picture.reduction > 1
    for u, v in ((0, 0), (0.999999, 0.999999), (0.4, 0.6)):
        got = crops.cut(picture, crops.random_window(*wh, 256, 384, u, v))
        reference = published_training(whole, 256, 384, u, v)
        assert difference(got, reference) < SCALED_DECODE
        shifted = published_training(whole, 256, 384, min(u + 0.02, 0.98), v)
        assert difference(got, reference) < difference(got, shifted)  # the position is right, not only the look


def test_every_offset_of_the_published_range_is_reached() -> None:
    offsets = [crops.random_window(500, 375, 256, 384, u, u) for u in np.linspace(0, 1, 4001)[:-1]]
    assert {w.left for w in offsets} == set(range(512 - 256 + 1))
    assert {w.top for w in offsets} == set(range(384 - 256 + 1))


def test_image_that_needs_no_resize_is_only_sliced() -> None:
    pixels = np.asarray(natural(512, 384))
    window = crops.random_window(512, 384, 256, 384, 0.5, 0.5)
    got = crops.cut(Picture(pixels, 512, 384, 1), window)
    assert got.base is not None
    np.testing.assert_array_equal(got, pixels[window.top : window.top + 256, window.left : window.left + 256])


@pytest.mark.parametrize("wh", [*SIZES[:-1], (1024, 512), (512, 511), (300, 3000)], ids=str)
@pytest.mark.parametrize("size", [256, 128])
def test_evaluation_crop_is_bit_equal(wh: tuple[int, int], size: int) -> None:
    image = natural(*wh)
    np.testing.assert_array_equal(crops.adm_center_crop(np.asarray(image), size), published_evaluation(image, size))
    strip = np.zeros((1, 60_000, 3), np.uint8)  # would grow to 15 million px in width
    assert crops.adm_center_crop(strip, size).shape == (size, size, 3)


@pytest.mark.parametrize("wh", [(500, 375), (375, 500), (257, 999)], ids=str)
def test_center_crop_of_raev2(wh: tuple[int, int]) -> None:
    image = natural(*wh)
    window = crops.center_window(*wh, 256)
    frame = image.resize((window.frame_width, window.frame_height), Image.Resampling.BICUBIC)
    y, x = round((frame.height - 256) / 2), round((frame.width - 256) / 2)
    got = crops.cut(Picture(np.asarray(image), *wh, 1), window)
    assert difference(got, np.asarray(frame)[y : y + 256, x : x + 256]) < ONE_PASS


def test_crop_is_a_function_of_seed_epoch_and_position() -> None:
    transform = TrainTransform(64, "random", None, DECODER, seed=3)
    data = dummy.jpeg(2)
    u, v = stream.generator(3, stream.Purpose.CROP, 5, 11).random(2)
    picture = DECODER.decode(data)
    window = crops.random_window(picture.width, picture.height, 64, 96, u, v)
    expected = crops.cut(DECODER.decode(data, 96), window)
    np.testing.assert_array_equal(transform(data, 5, 11), expected)
    assert not np.array_equal(transform(data, 5, 12), expected)
    assert not np.array_equal(transform(data, 6, 11), expected)


@pytest.mark.parametrize(
    ("crop", "shorter_px", "says"),
    [("center", 96, "train_crop.*resize_shorter_px"), ("random", 32, "resize_shorter_px=32.*image_size=64")],
)  # fmt: skip
def test_contradictions_name_both_keys(crop: str, shorter_px: int | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        TrainTransform(64, crop, shorter_px, DECODER, 0)  # type: ignore[arg-type]
