"""Curves as plotly figures, without the colours of a theme (page.js adds those)."""

import html
import json
from collections.abc import Iterator, Sequence

import plotly.graph_objects as go

from src.reporting.charts import Chart
from src.reporting.facts import starts
from src.reporting.reading import Run, labels
from src.reporting.series import Series, smooth, thin

PALETTE = ("#3b8bd4", "#e67e33", "#35a06c", "#b264c8", "#d6504c", "#94862f", "#22a5b0", "#d1699c")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def draw(chart: Chart, runs: Sequence[Run]) -> str:
    """JSON of {data, layout}, safe inside a <script>."""
    figure = go.Figure()
    several = len(runs) > 1
    short = labels([run.folder for run in runs], depth=1)  # legends have little room
    present = [tag for tag, _ in chart.tags if any(tag in run.series for run in runs)]
    for r, run in enumerate(runs):
        for tag, name in chart.tags:
            if tag not in run.series:
                continue
            t = present.index(tag)
            color = PALETTE[(r if several else t) % len(PALETTE)]
            label = f"{short[r]} {name}" if several and len(present) > 1 else short[r] if several else name
            for trace in _traces(
                run.series[tag], label, color, _DASHES[t % len(_DASHES)] if several else "solid", f"{r}-{t}"
            ):
                figure.add_trace(trace)
            if chart.better and (best := run.series[tag].best(chart.better)):
                figure.add_trace(_mark(best, label, color, f"{r}-{t}"))
    figure.update_layout(
        template="none",
        height=300,
        margin={"l": 56, "r": 16, "t": 10, "b": 40},
        hovermode="x unified",
        showlegend=several or len(present) > 1,
        legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
        xaxis={"title": {"text": "step", "standoff": 6}, "zeroline": False},
        yaxis={"zeroline": False, "tickformat": chart.format or None},
    )
    if not several:
        _mark_starts(figure, runs[0], present)
    return in_script(figure.to_json())


def in_script(text: str) -> str:
    """JSON that can stand in a <script>: no character there ends it."""
    json.loads(text)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _traces(series: Series, label: str, color: str, dash: str, group: str) -> Iterator[go.Scatter]:
    """The curve; of many points a running mean, the points themselves pale behind it."""
    mean = smooth(series)
    common = {"legendgroup": group, "name": html.escape(label)}
    few = len(series) <= 40
    if mean is not None:
        raw = thin(series)
        yield go.Scatter(
            **common,
            **_points(raw),
            mode="lines",
            line={"color": color, "width": 1},
            opacity=0.28,
            showlegend=False,
            hoverinfo="skip",
        )
    shown = thin(mean or series)
    yield go.Scatter(
        **common,
        **_points(shown),
        mode="lines+markers" if few else "lines",
        line={"color": color, "width": 2, "dash": dash},
        marker={"size": 5},
        hovertemplate="%{y:.5~g}",
    )


def _points(series: Series) -> dict[str, list[float | None]]:
    """Six significant digits; plotly leaves gaps for None."""
    finite = dict(series.finite)
    return {"x": list(series.steps), "y": [float(f"{finite[s]:.6g}") if s in finite else None for s in series.steps]}


def _mark(best: tuple[int, float], label: str, color: str, group: str) -> go.Scatter:
    return go.Scatter(
        x=[best[0]],
        y=[best[1]],
        mode="markers",
        name=html.escape(f"best {label}"),
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
        marker={"symbol": "star", "size": 12, "color": color},
    )


def _mark_starts(figure: go.Figure, run: Run, present: Sequence[str]) -> None:
    """A dotted line where a loss begins."""
    last = max((run.series[tag].steps[-1] for tag in present), default=0)
    for name, step in starts(run).items():
        if 0 < step <= last:
            figure.add_vline(x=step, line={"dash": "dot", "width": 1, "color": "#8a8f98"})
            figure.add_annotation(
                x=step,
                y=1,
                yref="paper",
                text=name,
                showarrow=False,
                xanchor="right",
                yanchor="top",
                textangle=-90,
                font={"size": 10, "color": "#8a8f98"},
            )
