"""Decode image bytes to upright RGB pixels. An image that can't be fully decoded raises `BadImage`.

Legend: H, W height and width in px. Pixels are uint8 0..255, H x W x 3, RGB.

Less common kinds are converted as by `PIL.Image.convert("RGB")` in the published pipeline:
    greyscale, palette, CMYK     their RGB colours (JPEG CMYK by Adobe's inverted convention)
    transparency                 dropped without blending: the colour stored under it shows
    animated, several pages      the first frame
    16 bits per channel          the upper 8 bits (the one deviation: Pillow clips a grey PNG to white)
"""

import functools
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin

Exif = Literal["apply", "ignore"]

# Raster formats decoded within this process. EPS is excluded: Pillow passes it to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF", "TGA", "ICO")
# Limit for compressed text and colour profiles in a PNG; at Pillow's default of 1 MiB, files with intact pixels are refused.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
ORIENTATION_TAG = 0x0112  # EXIF 2.3, 4.6.4


class BadImage(Exception):
    """The bytes can't be decoded to a complete image; the message gives a short reason."""


class Picture(NamedTuple):
    """A decoded image. A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, see `decode`."""

    pixels: np.ndarray
    """uint8, ceil(height / reduction) x ceil(width / reduction) x 3."""
    width: int
    """px of the full-size image, after EXIF rotation."""
    height: int
    reduction: int
    """1, 2, 4 or 8."""


@dataclass(frozen=True)
class Decoder:
    """Decode images under fixed options.

    exif: `apply` rotates the image by its EXIF orientation; `ignore` leaves it as stored, as the published code does.
    max_megapixels: images whose header declares more are refused before decoding (decompression bombs).
    """

    exif: Exif
    max_megapixels: float

    def decode(self, data: bytes | memoryview, min_shorter_px: int | None = None) -> Picture:
        """Decode an image.

        data: a complete file, not copied.
        min_shorter_px: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (DCT scaling), as long as its shorter
            side keeps at least that many px. None: always full size, bit-equal to Pillow's decoder.

        Raises:
            BadImage: empty, truncated, damaged, too large, or not an image.
        """
        data = memoryview(data)
        if not len(data):
            raise BadImage("empty file")
        try:
            header = None
            if data[:3] == b"\xff\xd8\xff" and not (header := _jpeg_header(data)):
                repaired = memoryview(_repaired(data))
                header = _jpeg_header(repaired)
                data = repaired if header else data
            if header:
                picture, orientation = self._decode_jpeg(data, *header, min_shorter_px)
            else:
                picture, orientation = self._decode_with_pillow(data)
        except BadImage:
            raise
        except Exception as error:  # decoders raise all kinds of errors: OSError, SyntaxError, struct.error
            raise BadImage(_one_line(error)) from error
        return _undo_orientation(picture, orientation) if self.exif == "apply" else picture

    def _decode_jpeg(
        self, data: memoryview, height: int, width: int, min_shorter_px: int | None
    ) -> tuple[Picture, int]:
        self._check_size(width, height)
        orientation = jpeg_orientation(data) if self.exif == "apply" else 1
        k = _reduction(width, height, min_shorter_px, exact=orientation != 1)
        size = {} if k == 1 else {"min_height": -(-height // k), "min_width": -(-width // k), "min_factor": k}
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", **size)
        except ValueError as error:
            # libjpeg reports only its first warning. With the harmless flaws repaired, it reports the next one.
            repaired = _repaired(data)
            try:
                pixels = simplejpeg.decode_jpeg(repaired, "RGB", **size)
            except ValueError as second:
                # Stray bytes between two markers are harmless, too, and occur in ImageNet. Any other warning means that the
                # rest is filled with grey or noise.
                if "extraneous bytes" not in str(second):
                    raise BadImage(_one_line(error)) from error
                pixels = simplejpeg.decode_jpeg(repaired, "RGB", strict=False, **size)
        return Picture(pixels, width, height, k), orientation

    def _decode_with_pillow(self, data: memoryview) -> tuple[Picture, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # palette transparency, damaged EXIF, Pillow's own size limit: all handled
            with Image.open(io.BytesIO(data), formats=_readable_formats()) as image:
                self._check_size(*image.size)
                image.load()
                orientation = _orientation(image) if self.exif == "apply" else 1
                pixels = _to_rgb(image)
        height, width = pixels.shape[:2]
        return Picture(pixels, width, height, 1), orientation

    def _check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise BadImage(f"{width} x {height} px")
        if width * height > self.max_megapixels * 1e6:
            raise BadImage(f"{width} x {height} px is more than {self.max_megapixels:g} megapixels (max_megapixels)")


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """Return the FORMATS that this build of Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _jpeg_header(data: memoryview) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that simplejpeg can decode; None: left to Pillow (CMYK, odd subsampling)."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if colours in ("YCbCr", "RGB", "Gray") else None


def _repaired(data: memoryview) -> bytes | memoryview:
    """Repair harmless flaws of a single-scan baseline JPEG: an unknown JFIF revision or Adobe colour code, wrong values of the
    scan's unused parameters, a missing end marker. Return anything else unchanged."""
    out, components = bytearray(data[:2]), 0
    for marker, at, end in _segments(data):
        segment = bytearray(data[at:end])
        if marker in (0xC0, 0xC1) and len(segment) > 9:
            components = segment[9]
        elif marker == 0xE0 and segment[4:9] == b"JFIF\0":
            segment[9] = 1
        elif marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) > 15:
            segment[15] = min(segment[15], 1)
        elif marker == 0xDA:
            if len(segment) < 8 or segment[4] != components:  # progressive, or several scans, of which some may be lost
                return data
            segment[-3:] = b"\0\x3f\0"
            rest = bytes(data[end:])
            return bytes(out + segment + rest + (b"" if b"\xff\xd9" in rest else b"\xff\xd9"))
        out += segment
    return data


def _segments(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of each segment before the pixels of a JPEG."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at + 1], at, end
        at = end


def jpeg_orientation(data: memoryview) -> int:
    """Read the EXIF orientation (1..8) of a JPEG from the segments before the pixels; 1 if there is none."""
    for marker, at, end in _segments(data):
        if marker == 0xDA or end < at + 4:  # start of scan
            return 1
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _orientation(None, data[at + 4 : end])
    return 1


def _orientation(image: Image.Image | None, segment: memoryview | None = None) -> int:
    """Return the orientation, 1..8, of an image or an EXIF segment; 1 if EXIF is damaged: the pixels may still be fine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif = image.getexif() if image is not None else Image.Exif()
            if segment is not None:
                exif.load(bytes(segment))
            value = exif.get(ORIENTATION_TAG)
        except Exception:
            return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _reduction(width: int, height: int, min_shorter_px: int | None, exact: bool) -> int:
    """Return the largest of 8, 4, 2, 1 that keeps `min_shorter_px`. `exact`: only if it divides both sides, because rotation
    would move a partial pixel at the right or lower edge to another side."""
    if min_shorter_px is None:
        return 1
    for k in (8, 4, 2):
        if min(width, height) >= k * min_shorter_px and not (exact and (width % k or height % k)):
            return k
    return 1


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # I;16, I;16B, and I, which Pillow uses for some 16-bit files
        grey = (np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is not known")
    return np.array(image.convert("RGB"))


def _undo_orientation(picture: Picture, orientation: int) -> Picture:
    """Undo the EXIF orientation: 2-4 mirror or rotate by 180 degrees, 5-8 also swap the sides."""
    if orientation == 1:
        return picture
    pixels, width, height, reduction = picture
    if orientation >= 5:
        pixels, width, height = pixels.transpose(1, 0, 2), height, width
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return Picture(np.ascontiguousarray(pixels), width, height, reduction)


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return re.sub(r" <_io\.BytesIO object at \w+>", "", text[0])[:160] if text else type(error).__name__
