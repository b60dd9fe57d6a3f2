"""What people look for first: how a run ended, its best scores and over how many images, and what was not trained."""

import math
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from src.reporting.reading import Run

FEW_IMAGES = 2048
"""Below it, fewer images than Inception features: the covariance has no full rank, and the score is biased upward."""
_UNTRAINED = re.compile(r"UNTRAINED by request: (.+?)\. ")
_STARTS = re.compile(r"(LPIPS|discriminator|GAN term) at step ([\d,]+)")


@dataclass(frozen=True)
class Fact:
    """A tile: `0.57`, rFID, `at step 12,000, over 50,000 images`."""

    name: str
    value: str
    detail: str = ""
    doubt: str = ""
    """Why the value means less than it seems."""


def status(run: Run) -> str:
    """As run.json has it; `unknown` without one."""
    return str(run.record.get("status") or "unknown")


def facts(run: Run) -> list[Fact]:
    found = [_steps(run), *_scores(run), _speed(run), _device(run), _time(run)]
    return [fact for fact in found if fact is not None]


def untrained(run: Run) -> list[str]:
    """Parts whose weights were never trained: as the run said itself, and as its configuration says."""
    said = [
        part for text in warnings(run) for match in _UNTRAINED.finditer(text + " ") for part in match[1].split(", ")
    ]
    if not said:
        said = [
            f"{key} ({value})"
            for key, value in flat(run.config).items()
            if key.endswith("weights") and value in ("untrained", "tiny")
        ]
    elif any(name.startswith("rfid_untrained") for name in run.series):
        said.append("Inception network")
    return list(dict.fromkeys(said))


def warnings(run: Run) -> list[str]:
    """Of run.json, then those of run.log that it lacks; each once."""
    listed = run.record.get("warnings")
    found = [str(text) for text in listed] if isinstance(listed, list) else []
    return list(
        dict.fromkeys([*found, *(text for text in run.log_warnings if not any(text in known for known in found))])
    )


def starts(run: Run) -> dict[str, int]:
    """Steps at which losses begin, as the start-up table of run.log has them."""
    return {name: int(step.replace(",", "")) for name, step in _STARTS.findall(run.log)}


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; empty groups stay as they are."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        leaves |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return leaves


def number(value: Any) -> str:
    """Four significant digits for people; thousands with commas."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _steps(run: Run) -> Fact | None:
    step = run.result.get("step") or max(
        (series.steps[-1] for series in run.series.values() if series.steps), default=None
    )
    if step is None:
        return None
    epochs, wanted = run.result.get("epochs"), _part(run.config, "trainer", "max_epochs")
    detail = (
        f"epoch {number(epochs)} of {number(wanted)}"
        if epochs and wanted
        else f"of {number(wanted)} epochs"
        if wanted
        else ""
    )
    return Fact("steps", number(step), detail)


def _scores(run: Run) -> Iterator[Fact]:
    parts = untrained(run)
    for group, name in (
        ("rfid_full", "rFID, all images"),
        ("rfid", "best rFID"),
        ("rfid_untrained_full", "FID distance, all images"),
        ("rfid_untrained", "best FID distance"),
    ):
        if (series := run.series.get(f"{group}/score")) and (best := series.best("low")):
            images = run.series[f"{group}/images"].at(best[0]) if f"{group}/images" in run.series else None
            doubt = "untrained Inception: no rFID" if "untrained" in group else ""
            if not doubt and (images is None or images < FEW_IMAGES):
                doubt = f"under {FEW_IMAGES:,} images: biased upward" if images is not None else ""
            yield Fact(name, number(best[1]), f"step {best[0]:,} · {_images(images)}", doubt)
    held_out = _held_out(run)
    for tag, name, better, unit, doubt in (
        ("val/psnr", "best PSNR", "high", " dB", ""),
        ("val/ssim", "best SSIM", "high", "", ""),
        ("val/lpips", "best LPIPS", "low", "", "untrained network: no LPIPS" if "LPIPS" in parts else ""),
        ("val/loss", "best validation loss", "low", "", ""),
    ):
        if (series := run.series.get(tag)) and (best := series.best(better)):
            yield Fact(name, number(best[1]) + unit, f"step {best[0]:,} · {held_out}", doubt)


def _images(count: float | None) -> str:
    return f"{int(count):,} images" if count is not None and math.isfinite(count) else "number of images not recorded"


def _held_out(run: Run) -> str:
    """How many images validation used."""
    limit = _part(run.config, "trainer", "limit_val_batches")
    if limit not in (None, 1.0):
        return f"held-out images (trainer.limit_val_batches={limit})"
    count = _part(run.record, "data", "validation")
    if count is None and (match := re.search(r"training images, ([\d,]+) held out", run.log)):
        count = int(match[1].replace(",", ""))
    return f"{number(count)} held-out images" if count is not None else "number of images not recorded"


def _speed(run: Run) -> Fact | None:
    if isinstance(mean := run.result.get("images_per_s"), int | float):
        return Fact("images/s", number(mean), "mean of the run")
    points = run.series["perf/images_per_s"].finite if "perf/images_per_s" in run.series else []
    return Fact("images/s", number(statistics.median(v for _, v in points)), "median so far") if points else None


def _device(run: Run) -> Fact | None:
    if not (device := run.record.get("device")):
        return None
    precision = _part(run.config, "trainer", "precision")
    return Fact("device", f"{run.record.get('processes', 1)} × {device}", f"precision {precision}" if precision else "")


def _time(run: Run) -> Fact | None:
    started, ended = (_moment(run.record.get(key)) for key in ("started", "ended"))
    if started is None:
        return None
    if ended is not None:
        return Fact("duration", duration((ended - started).total_seconds()), f"ended {ended:%Y-%m-%d %H:%M}")
    if run.last_event is not None:
        last = datetime.fromtimestamp(run.last_event)
        return Fact(
            "duration so far", duration((last - started).total_seconds()), f"last written {last:%Y-%m-%d %H:%M}"
        )
    return Fact("started", f"{started:%Y-%m-%d %H:%M}")


def duration(seconds: float) -> str:
    """59 -> `59 s`, 9000 -> `2 h 30 min`, 200000 -> `2 d 8 h`."""
    seconds = max(seconds, 0)
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _moment(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)).replace(tzinfo=None)
    except ValueError:
        return None


def _part(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content
