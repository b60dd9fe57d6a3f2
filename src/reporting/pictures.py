"""The pictures that a run left, evenly over its time, as data URIs of bounded size."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from src.core.run_names import run_id
from src.core.weights import resolve
from src.reporting.reading import Run

MAX_BYTES = 1_000_000
"""A larger file is scaled down and compressed with losses, and says so."""
MAX_WIDTH_PX = 1600
_MAX_PIXELS = 85_000_000  # 64 triplets of 512 px are 50 M; more is a bomb
_STEP, _EPOCH = re.compile(r"step_(\d+)"), re.compile(r"epoch_(\d+)")
T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    step: int | None
    """None: at the end of training."""
    caption: str
    uri: str
    width: int
    height: int


def samples(run: Run, limit: int) -> list[Picture]:
    """RUN/samples/step_XXXXXXX.png: originals above their reconstructions."""
    found = [
        (int(match[1]), file)
        for file in (run.folder / "samples").glob("*.png")
        if (match := _STEP.fullmatch(file.stem))
    ]
    return _embed(run, [(step, f"step {step:,}", file) for step, file in sorted(found)], limit)


def rfid_sheets(run: Run, limit: int) -> list[Picture]:
    """The contact sheets of rFID evaluations; none where the configuration doesn't say where they are."""
    callbacks = run.config.get("callbacks")
    settings = callbacks.get("rfid") if isinstance(callbacks, dict) else None
    place = settings.get("rfid_output_dir") if isinstance(settings, dict) else None
    if not isinstance(place, str) or "${" in place:
        return []
    found: list[tuple[float, str, Path]] = []
    for file in (resolve(place) / run_id(run.folder)).glob("*/sheet.png"):
        name = file.parent.name
        if match := _STEP.fullmatch(name):
            found.append((int(match[1]), f"step {int(match[1]):,}", file))
        elif match := _EPOCH.fullmatch(name):
            found.append((int(match[1]) * _steps_per_epoch(run), f"end of epoch {int(match[1])}", file))
        elif name == "end":
            found.append((float("inf"), "end of training", file))
    ordered = [(None if step == float("inf") else int(step), caption, file) for step, caption, file in sorted(found)]
    return _embed(run, ordered, limit)


def evenly(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of them with the first and the last, the others at equal distances."""
    if len(items) <= limit:
        return list(items)
    if limit == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _embed(run: Run, found: Sequence[tuple[int | None, str, Path]], limit: int) -> list[Picture]:
    pictures = []
    for step, caption, file in evenly(found, limit):
        try:
            uri, size, remark = encode(file)
        except Exception as error:  # Pillow raises many kinds on damaged files
            run.notes.append(f"{file.parent.name}/{file.name} can't be shown: {error}.")
            continue
        pictures.append(Picture(step, caption + remark, uri, *size))
    return pictures


def encode(file: Path) -> tuple[str, tuple[int, int], str]:
    """Data URI, size as shown in px, and a remark where it isn't the file as it lies."""
    content = file.read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        if picture.format != "PNG" or picture.width * picture.height > _MAX_PIXELS:
            raise ValueError(f"a {picture.format} of {picture.width} x {picture.height} px is no sheet")
        picture.load()
        if len(content) <= MAX_BYTES:
            return _uri(content, "png"), picture.size, ""
        whole, size = picture.convert("RGB"), picture.size
    width = min(size[0], MAX_WIDTH_PX)
    while True:
        small = whole.resize((width, max(1, round(size[1] * width / size[0]))), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=88, subsampling=0)
        if buffer.tell() <= MAX_BYTES or width < 64:
            remark = f" (JPEG, {small.width} x {small.height} px of {size[0]} x {size[1]})"
            return _uri(buffer.getvalue(), "jpeg"), small.size, remark
        width = width * 4 // 5


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _steps_per_epoch(run: Run) -> int:
    """From the run's result, else from the start-up table; 0 puts epochs before steps."""
    step, epochs = run.result.get("step"), run.result.get("epochs")
    if isinstance(step, int) and isinstance(epochs, int) and epochs > 0:
        return step // epochs
    match: Any = re.search(r"steps +([\d,]+) an epoch", run.log)
    return int(match[1].replace(",", "")) if match else 0
