"""Every file decodes to upright RGB or raises BadImage."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from src.data import dummy
from src.data.decode import BadImage, Decoder

DECODER = Decoder("apply", 80)
AS_STORED = Decoder("ignore", 80)


def photo(index: int = 1) -> Image.Image:
    return Image.fromarray(dummy.picture(np.random.default_rng(index), "box"))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    "options",
    [{"quality": 90}, {"quality": 90, "subsampling": 0}, {"quality": 80, "progressive": True}, {"quality": 75, "subsampling": 1}],
    ids=["420", "444", "progressive", "422"],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_equals_pillow_bit_for_bit(options: dict, mode: str) -> None:
    data = encoded(photo().convert(mode), "JPEG", **options)
    np.testing.assert_array_equal(DECODER.decode(data).pixels, by_pillow(data))


def test_cmyk_follows_adobe_convention() -> None:
    source = photo().convert("RGB")
    data = encoded(source.convert("CMYK"), "JPEG", quality=95)
    pixels = DECODER.decode(data).pixels
    np.testing.assert_array_equal(pixels, by_pillow(data))
    assert np.abs(pixels.astype(int) - np.asarray(source)).mean() < 6  # inverted, it would be off by more than 60


RAMP = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (40, 1))
ALPHA = Image.linear_gradient("L")


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(ALPHA.resize(image.size))
    return image


@pytest.mark.parametrize(
    ("image", "kind", "options", "expected"),
    [
        *((photo(), kind, {}, None) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")),
        *((photo().quantize(32), "PNG", o, photo().quantize(32)) for o in ({}, {"transparency": 3}, {"transparency": bytes(range(32))})),
        (photo(), "PNG", {"icc_profile": bytes(2 << 20)}, photo()),
        *((with_alpha(photo().convert(mode)), "PNG", {}, photo().convert(mode)) for mode in ("RGB", "L")),  # dropped, not blended
        *((Image.fromarray(RAMP), kind, {}, Image.fromarray((RAMP >> 8).astype(np.uint8))) for kind in ("PNG", "TIFF")),
    ],
)  # fmt: skip
def test_other_formats(image: Image.Image, kind: str, options: dict, expected: Image.Image | None) -> None:
    data = encoded(image, kind, **options)
    reference = by_pillow(data) if expected is None else np.asarray(expected.convert("RGB"))
    np.testing.assert_array_equal(DECODER.decode(data).pixels, reference)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated_gives_first_frame(kind: str) -> None:
    first, second = Image.new("RGB", (64, 48), (250, 10, 10)), Image.new("RGB", (64, 48), (10, 10, 250))
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = DECODER.decode(encoded(first, kind, save_all=True, append_images=[second], **options)).pixels
    assert pixels.shape == (48, 64, 3)
    assert (np.abs(pixels.astype(int) - (250, 10, 10)) < 4).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo().resize((96, 64)), kind, exif=exif)
    image = Image.open(io.BytesIO(data))
    image.load()
    upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    picture = DECODER.decode(data)
    np.testing.assert_array_equal(picture.pixels, upright)
    assert (picture.height, picture.width) == upright.shape[:2]
    np.testing.assert_array_equal(AS_STORED.decode(data).pixels, by_pillow(data))


def test_damaged_exif_is_ignored() -> None:
    data = encoded(photo(), "JPEG")
    block = b"Exif\0\0" + b"MM\0\x2a\0\0\0\xff" + bytes(range(40))
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    np.testing.assert_array_equal(DECODER.decode(broken).pixels, by_pillow(data))


@pytest.mark.parametrize(
    ("shorter", "reduction"), [(None, 1), (400, 1), (301, 1), (300, 2), (150, 4), (80, 4), (75, 8), (9, 8)]
)
def test_reduction_keeps_what_the_resize_needs(shorter: int | None, reduction: int) -> None:
    data = encoded(photo().resize((801, 600)), "JPEG")
    picture = DECODER.decode(data, min_shorter_px=shorter)
    assert (picture.width, picture.height, picture.reduction) == (801, 600, reduction)
    assert picture.pixels.shape == (-(-600 // reduction), -(-801 // reduction), 3)


def png(width: int, height: int, bits: int, pixels: bytes) -> bytes:
    """Write an RGB PNG by hand."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def test_sixteen_bit_rgb_png() -> None:
    values = (np.arange(12 * 9 * 3).reshape(9, 12, 3) * 200).astype(">u2")
    data = png(12, 9, 16, b"".join(b"\0" + row.tobytes() for row in values))
    np.testing.assert_array_equal(DECODER.decode(data).pixels, values >> 8)


@pytest.mark.parametrize("side", [60000, 9500])  # beyond Pillow's own limit, and between ours and Pillow's
def test_decompression_bombs_are_rejected_by_their_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small = encoded(photo(), "JPEG")
    jpeg = bytearray(small)
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *a, **k: pytest.fail("decoded"))
    for data in (png(side, side, 8, b""), bytes(jpeg)):
        with pytest.raises(BadImage, match=r"megapixels|exceeds limit"):
            DECODER.decode(data)
    with pytest.raises(BadImage, match="megapixels"):
        Decoder("apply", 0.01).decode(small)


def test_truncated_image_is_an_error() -> None:
    image = photo()
    data = encoded(image, "JPEG")
    whole = [data, encoded(image, "JPEG", progressive=True), encoded(image, "PNG"), encoded(image, "GIF")]
    cut = [one[: int(len(one) * share)] for one in whole for share in (0.02, 0.3, 0.6, 0.9, 0.99)]
    cut += [data[: len(data) // 2] + b"\xff\xd9", encoded(image.convert("CMYK"), "JPEG")[:-3000]]  # end marker; CMYK
    for one in cut:
        with pytest.raises(BadImage):
            DECODER.decode(one)


FLAWS = {  # functions of a file and the offset of its pixels
    "a wrong last coefficient in the scan header": lambda data, at: data[: at - 2] + b"\x11" + data[at - 1 :],
    "a wrong first coefficient in the scan header": lambda data, at: data[: at - 3] + b"\x05" + data[at - 2 :],
    "an unknown revision of JFIF": lambda data, at: data[:11] + b"\x09" + data[12:],
    "an unknown colour code of Adobe": lambda data, at: data[:2] + b"\xff\xee\0\x0eAdobe\0d\0\0\0\0\x07" + data[20:],
    "no end marker": lambda data, at: data[:-2],
}  # fmt: skip


@pytest.mark.parametrize("flaw", FLAWS)
def test_harmless_flaws_are_accepted_but_do_not_hide_truncation(flaw: str) -> None:
    data = encoded(photo(), "JPEG")
    scan = data.index(b"\xff\xda")
    flawed = FLAWS[flaw](data, scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big"))
    np.testing.assert_array_equal(DECODER.decode(flawed).pixels, by_pillow(data))
    half = flawed[: 2 * len(data) // 3]
    for lost in (half, half + b"\xff\xd9"):  # truncated as well
        with pytest.raises(BadImage):
            DECODER.decode(lost)


def test_stray_bytes_are_ignored() -> None:
    data = encoded(photo(), "JPEG")
    for padded in (data + b"\0\0tail", data[:-2] + b"\x00\x12\x34" + data[-2:]):
        np.testing.assert_array_equal(DECODER.decode(padded).pixels, by_pillow(data))


@pytest.mark.parametrize("data", [
    b"", b"\xff\xd8\xff", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg></svg>", bytes(4096),
    encoded(photo(), "JPEG", progressive=True)[:-2],  # without an end marker, a scan may be missing
    encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),  # unknown value range
])  # fmt: skip
def test_unsupported_data_is_rejected(data: bytes) -> None:
    with pytest.raises(BadImage) as found:
        DECODER.decode(data)
    assert not any(words in f"{found.value}." for words in (" at 0x", " it.", "Ghostscript"))  # it runs programs


def test_fuzz_gives_an_array_or_bad_image() -> None:
    rng = np.random.default_rng(7)
    small = photo().resize((70, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [encoded(small, "JPEG", exif=exif), encoded(small, "JPEG", progressive=True)]
    seeds += [encoded(small.convert("CMYK"), "JPEG"), encoded(small.quantize(16), "PNG", transparency=1)]
    seeds += [encoded(small, kind) for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")]
    seeds += [encoded(small, "TIFF", compression="tiff_lzw")]
    good, reasons = 0, []
    for _ in range(150):
        for seed in seeds:
            data = bytearray(seed[: rng.integers(1, len(seed) + 1)] if rng.random() < 0.3 else seed)
            for _ in range(rng.integers(1, 6)):
                data[rng.integers(len(data))] = rng.integers(256)
            try:
                picture = Decoder("apply", 1).decode(bytes(data), min_shorter_px=16)
            except BadImage as error:
                reasons.append(str(error))
                continue
            good += 1
            k = picture.reduction
            assert picture.pixels.shape == (-(-picture.height // k), -(-picture.width // k), 3)
            assert picture.pixels.dtype == np.uint8
            assert picture.pixels.flags.c_contiguous
    assert good > 100
    assert all(reason and "\n" not in reason for reason in reasons)
