"""A logged figure over the steps of a run: joined, thinned for drawing, and smoothed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Point = tuple[int, float]
"""(optimiser step, value); values may be NaN or infinite."""

DRAWN_POINTS = 3000
SMOOTHED_FROM = 120
"""Points from which a running mean helps the eye."""


@dataclass(frozen=True)
class Series:
    """Steps ascending, each once."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> list[Point]:
        return [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]

    def best(self, better: str) -> Point | None:
        """The first point with the lowest (`better` = "low") or the highest ("high") finite value."""
        sign = 1 if better == "low" else -1
        return min(self.finite, key=lambda point: (sign * point[1], point[0]), default=None)

    def at(self, step: int) -> float | None:
        return dict(zip(self.steps, self.values, strict=True)).get(step)


def join(parts: Iterable[list[Point]]) -> Series:
    """Parts in the order of their writing. A later part is a run that went on from an earlier state: it replaces what
    the earlier parts have from its first step on."""
    kept: dict[int, float] = {}
    for part in parts:
        first = min((step for step, _ in part), default=None)
        if first is not None:
            kept = {step: value for step, value in kept.items() if step < first}
            kept.update(part)
    steps = sorted(kept)
    return Series(tuple(steps), tuple(kept[step] for step in steps))


def thin(series: Series, limit: int = DRAWN_POINTS) -> Series:
    """At most `limit` points: first and last, and of each stretch the lowest and the highest, so that spikes stay.

    Values that are no finite numbers don't count as extremes; a stretch of nothing else keeps its first one (a gap).
    """
    if len(series) <= limit:
        return series
    inner = len(series) - 2
    borders = [1 + inner * i // ((limit - 2) // 2) for i in range((limit - 2) // 2 + 1)]
    chosen = {0, len(series) - 1}
    for first, end in zip(borders, borders[1:], strict=False):
        numbers = [i for i in range(first, end) if math.isfinite(series.values[i])]
        if numbers:
            chosen |= {min(numbers, key=series.values.__getitem__), max(numbers, key=series.values.__getitem__)}
        elif first < end:
            chosen.add(first)
    places = sorted(chosen)
    return Series(tuple(series.steps[i] for i in places), tuple(series.values[i] for i in places))


def smooth(series: Series) -> Series | None:
    """Running mean over a fortieth of the points, centred, shorter at the ends; None for few points.

    Values that are no finite numbers are left out of the means.
    """
    if len(series) < SMOOTHED_FROM:
        return None
    values = np.asarray(series.values, dtype=np.float64)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    half = max(2, len(values) // 80)
    places = np.arange(len(values))
    # Symmetric as far as the ends allow, so that slopes stay; there a quarter of the reach, so that noise doesn't return.
    reach = np.maximum(np.minimum(half, np.minimum(places, len(values) - 1 - places)), half // 4)
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    number = counts[high] - counts[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(number > 0, (sums[high] - sums[low]) / number, np.nan)
    return Series(series.steps, tuple(means.tolist()))
