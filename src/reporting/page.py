"""Render runs as one self-contained HTML file: styles, plotly.js, curves and images are embedded."""

import base64
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from src.core.run_names import run_id
from src.core.text import duration, flat
from src.core.weights import resolve
from src.reporting.figures import CHARTS, PALETTE, best, charts
from src.reporting.reading import Run

_SHEETS = "callbacks.rfid.rfid_output_dir"
_FACT = Markup("<b>{}</b> <small>{} <em>{}</em></small>")
"""A value such as `0.57`, details such as `step 12,000 · 1,000 images`, and a caveat."""
_WARNING = re.compile(r"^\d{4}-[\d:, -]+ (?:WARNING|ERROR|CRITICAL) [\w.]+: (.*(?:\n(?!\d{4}-).*)*)", re.MULTILINE)


def page(runs: Sequence[Run]) -> str:
    """Return the HTML; it depends only on the files of the runs."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    configs = [flat(run.config) for run in runs]
    places = [resolve(str(flat(run.config).get(_SHEETS))) / run_id(run.folder) for run in runs]
    return environment.get_template("page.html.j2").render(
        runs=runs,
        palette=PALETTE,
        untrained=[untrained(run) for run in runs],
        facts=aligned([facts(run) for run in runs]),
        charts=charts(runs),
        samples=[pictures(run, run.folder / "samples", "*.png", 12 // len(runs)) for run in runs],
        sheets=[pictures(run, place, "*/sheet.png", 4 // len(runs)) for run, place in zip(runs, places, strict=True)],
        warnings=[dict.fromkeys(text.strip() for text in _WARNING.findall(run.log)) for run in runs],
        differences=[
            (key, cells)
            for key, cells in aligned(configs)
            if key != "paths.run_dir" and any(cell != cells[0] for cell in cells)
        ],
        configs=[yaml.safe_dump(run.config, sort_keys=False) for run in runs],
        records=aligned([{k: number(v) for k, v in flat(run.record).items() if k != "warnings"} for run in runs]),
        plotly_js=Markup(get_plotlyjs()),
    )


def facts(run: Run) -> dict[str, Markup]:
    """Return the key facts of a run, by name."""
    record, config = flat(run.record), flat(run.config)
    held_out = record.get("data.validation", "") if config.get("trainer.limit_val_batches") in (None, 1.0) else "some"
    last = record.get("result.step") or max((max(series) for series in run.series.values()), default=0)
    found = {"steps": _FACT.format(number(last), f"in at most {config.get('trainer.max_epochs')} epochs", "")}
    for chart in CHARTS:
        for name in filter(re.compile(chart.names).fullmatch, run.series):
            if point := best(chart, name, run.series[name]):
                group, images = name.partition("/")[0], f"{number(held_out)} held-out images"
                count = run.series.get(f"{group}/images", {}).get(point[0], math.nan)
                images = images if group == "val" else f"{number(count)} images"
                few = "under 2,048 images: biased upward" if count < 2048 else ""  # the feature dimension
                title = f"best {chart.title}{', all images' if group.endswith('_full') else ''}"
                found[title] = _FACT.format(number(point[1]), f"step {point[0]:,} · {images}", few)
    if speeds := [value for value in run.series.get("perf/images_per_s", {}).values() if math.isfinite(value)]:
        found["images/s"] = _FACT.format(number(statistics.median(speeds)), "median", "")
    if run.times:
        end = f"last logged {datetime.fromtimestamp(max(run.times)):%Y-%m-%d %H:%M}"
        found["time"] = _FACT.format(duration(max(run.times) - min(run.times)), end, "")
    device = f"{record.get('processes', 1)} × {record.get('device', 'unknown')}"
    return {**found, "device": _FACT.format(device, f"precision {config.get('trainer.precision')}", "")}


def untrained(run: Run) -> list[str]:
    """Return the parts with random weights, from the run's log, else from its config."""
    logged = re.findall(r"UNTRAINED by request: ([^.]+)", run.log)
    inception = ["Inception network"] * any(
        name.startswith(("rfid_untrained", "gfid_untrained")) for name in run.series
    )
    config = [f"{k} ({v})" for k, v in flat(run.config).items() if k.endswith("weights") and v in ("untrained", "tiny")]
    return list(dict.fromkeys((logged or config) + inception))


def pictures(run: Run, folder: Path, pattern: str, limit: int) -> list[tuple[float, str, str]]:
    """Return step, caption and data URI of up to `limit` PNG files (at least 2), evenly spaced in time. A file, or the folder
    of a sheet.png, is named step_X, epoch_X or end. Files over 1 MB are converted to smaller JPEGs."""
    epoch, found, limit = re.search(r"steps +([\d,]+) an epoch", run.log), [], max(limit, 2)
    steps = {"step": 1, "epoch": int(epoch[1].replace(",", "")) if epoch else 0, "end": math.inf}
    for file in folder.glob(pattern):
        name = file.parent.name if file.stem == "sheet" else file.stem
        if match := re.fullmatch(r"(step|epoch|end)_?(\d*)", name):
            found.append((steps[match[1]] * int(match[2] or 1), re.sub("_0*", " ", name), file))
    found.sort()
    embedded = []
    for place in sorted({round(i * (len(found) - 1) / (limit - 1)) for i in range(limit) if found}):
        step, caption, file = found[place]
        content, kind = file.read_bytes(), "png"
        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                picture.load()
                if len(content) > 1_000_000:
                    picture.thumbnail((1600, 4000))
                    picture.convert("RGB").save(buffer := io.BytesIO(), "JPEG", quality=85)
                    content, kind = buffer.getvalue(), "jpeg"
            embedded.append((step, caption, f"data:image/{kind};base64,{base64.b64encode(content).decode()}"))
        except Exception as error:  # Pillow raises all kinds of errors on damaged files
            run.notes.append(f"{file.parent.name}/{file.name} can't be shown: {error}.")
    return embedded


def aligned(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Align columns by key: [{"a": 1}, {"b": 2}] -> [("a", [1, "–"]), ("b", ["–", 2])]."""
    names = dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def number(value: Any) -> str:
    """Format a number with four significant digits and commas; join the items of a list; return anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"
