"""Draw the curves of runs with plotly. page.css sets the colours of text and grid."""

import html
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup

from src.reporting.reading import Run, Series

PALETTE = ("#3b8bd4", "#e67e33", "#35a06c", "#b264c8", "#d6504c", "#94862f", "#22a5b0", "#d1699c")
"""Colours: one per logged name for a single run, one per run for several."""
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_BUTTON = {"label": "log", "method": "relayout", "args": ["yaxis.type", "log"], "args2": ["yaxis.type", "linear"]}
_LAYOUT = {
    "template": "none",
    "height": 300,
    "margin": {"l": 56, "r": 16, "t": 30, "b": 30},
    "hovermode": "x unified",
    "legend": {"orientation": "h", "y": -0.12},
    "xaxis": {"zeroline": False},
    "yaxis": {"zeroline": False, "exponentformat": "e"},
    "updatemenus": [{"type": "buttons", "buttons": [_BUTTON], "x": 0, "y": 1.16, "xanchor": "left"}],
}


class Chart(NamedTuple):
    title: str
    names: str
    """Regular expression that matches logged names."""
    about: str = ""
    better: Callable[..., Any] | None = None
    """`min` or `max`: mark the best evaluation score and show it at the top of the page."""


CHARTS = (
    Chart(
        "Loss",
        "(train|val)/loss",
        "Training batches (online weights) and held-out images (EMA weights; stage 1: L1 + LPIPS without GAN).",
        min,
    ),
    Chart("Loss by quarter of t", r"(train|val)/loss_q\d", "Stage 2: q1 is closest to the data, q4 to noise."),
    Chart("rFID", "rfid(_full)?/score", "Originals against reconstructions (EMA weights); lower is better.", min),
    Chart("gFID", "gfid/score", "Samples (EMA weights) against the reference; lower is better.", min),
    Chart(
        "FID distance, UNTRAINED Inception",
        "[rg]fid_untrained(_full)?/score",
        "Not comparable with any rFID or gFID.",
        min,
    ),
    Chart("sFID", r"gfid\w*/sfid", "gFID of spatial features; lower is better."),
    Chart("Inception Score", r"gfid\w*/inception_score", "Of the samples alone; higher is better."),
    Chart("Precision and recall", r"gfid\w*/(precision|recall)", "Samples near the reference, and the reverse."),
    Chart("PSNR (dB)", r"(val|rfid\w*)/psnr", "Reconstructions by the EMA weights; higher is better.", max),
    Chart("L1", "(train|val)/l1", "Mean absolute difference of images in [0, 1]."),
    Chart("LPIPS", r"(train|val|rfid\w*)/lpips", "Perceptual distance; lower is better.", min),
    Chart("SSIM", r"(val|rfid\w*)/ssim", "Structural similarity; higher is better.", max),
    Chart("GAN term", "train/gan", "The generator's adversarial loss before weighting."),
    Chart("Adaptive weight", "train/adaptive_weight", "Ratio of gradient norms that scales the GAN term."),
    Chart("Discriminator loss", "disc/loss", "0: perfect; 1 (hinge): chance."),
    Chart("Discriminator accuracy", "disc/accuracy", "Share of patch logits on the right side of 0; 0.5 is chance."),
    Chart("Discriminator logits", "disc/logits_.+", "Mean output for originals (real) and reconstructions (fake)."),
    Chart("Gradient norm", "train/grad_norm", "Decoder or transformer, before clipping."),
    Chart("Learning rate", "lr/.+"),
    Chart("Throughput (images/s)", "perf/images_per_s", "All processes; excludes evaluation and sample images."),
    Chart("Model FLOPs utilisation", "perf/mfu", "Share of the peak set by callbacks.progress.peak_tflops."),
    Chart("Waiting for data", "perf/data_wait", "Share of the time; above a fifth, data loading is the bottleneck."),
    Chart("Peak memory (GB)", "perf/memory_gb", "Rank 0: memory of its GPU, or of the process on a CPU."),
)


def charts(runs: Sequence[Run]) -> list[tuple[Chart, Markup]]:
    """Return each chart that has data, with its HTML; logged names without a chart get one each."""
    logged = sorted({name for run in runs for name in run.series if not name.endswith(("/images", "/seconds"))})
    found = [(chart, [name for name in logged if re.fullmatch(chart.names, name)]) for chart in CHARTS]
    known = {name for _, names in found for name in names}
    found += [(Chart(name, ""), [name]) for name in logged if name not in known]
    return [(chart, _draw(chart, names, runs, f"plot-{i}")) for i, (chart, names) in enumerate(found) if names]


def best(chart: Chart, name: str, series: Series) -> tuple[int, float] | None:
    """Return step and value of the best finite evaluation score; None if `name` is not such a score."""
    if chart.better is None or not re.fullmatch(r"val/.*|.*/score", name):
        return None
    finite = [(step, value) for step, value in series.items() if math.isfinite(value)]
    return chart.better(finite, key=lambda point: point[1], default=None)


def _draw(chart: Chart, names: Sequence[str], runs: Sequence[Run], key: str) -> Markup:
    several = len(runs) > 1
    figure = go.Figure(layout={**_LAYOUT, "showlegend": several or len(names) > 1})
    for r, run in enumerate(runs):
        for n, name in enumerate(names):
            series = run.series.get(name, {})
            every = slice(None, None, len(series) * len(runs) // 20_000 + 1)  # thin out long runs
            color = PALETTE[(r if several else n) % len(PALETTE)]
            figure.add_scatter(
                x=list(series)[every],
                y=list(series.values())[every],
                name=html.escape(f"{run.label} {name}" if several else name),
                line={"color": color, "dash": _DASHES[n % len(_DASHES)] if several else "solid"},
                mode="lines+markers" if len(series) < 40 else "lines",
                hovertemplate="%{y:.5~g}",
            )
            if point := best(chart, name, series):
                star = {"marker": {"symbol": "star", "size": 12, "color": color}, "hoverinfo": "skip"}
                figure.add_scatter(x=point[:1], y=point[1:], mode="markers", showlegend=False, **star)
    starts = re.findall(r"(LPIPS|discriminator|GAN term) at step ([\d,]+)", runs[0].log)  # when losses start
    for name, step in {} if several else {**dict(starts), "resumed": str(runs[0].resumed_at)}.items():
        if 0 < (x := int(step.replace(",", ""))) <= max(max(runs[0].series[name]) for name in names):
            figure.add_vline(x, line={"dash": "dot", "color": "#8a8f98"}, annotation={"text": name, "textangle": -90})
    return Markup(figure.to_html({"displaylogo": False}, include_plotlyjs=False, full_html=False, div_id=key))
