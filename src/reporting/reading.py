"""A run from the files in its folder. What is missing or broken becomes a note; only a folder of no run is an error."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.core.errors import UserError
from src.core.weights import resolve
from src.reporting.events import Scalars, read_csv, read_events
from src.reporting.series import Series, join

RECORD, CONFIG, OVERRIDES, LOG = "run.json", ".hydra/config.yaml", ".hydra/overrides.yaml", "run.log"
EVENTS, TABLES, PICTURES = "events.out.tfevents.*", "csv/metrics*.csv", "samples/step_*.png"
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\w+) [\w.]+: (.*)")
_LOG_BYTES = 32 << 20


@dataclass
class Run:
    """Everything is as the files have it: nothing here has been escaped or checked for its meaning."""

    folder: Path
    label: str
    """The end of its path that tells it from the other runs of the page."""
    record: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    overrides: list[str] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    """By logged name."""
    log: str = ""
    log_warnings: list[str] = field(default_factory=list)
    last_event: float | None = None
    """Seconds since 1970 of the last thing that TensorBoard's file got."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, for people."""

    @property
    def result(self) -> dict[str, Any]:
        """The figures that a run ends with; empty while it goes on."""
        result = self.record.get("result")
        return result if isinstance(result, dict) else {}

    @property
    def name(self) -> str:
        return str(self.record.get("experiment_name") or self.config.get("experiment_name") or "run")


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Raises UserError: a folder that is missing, no run's, or given twice."""
    places = [_place(folder) for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} is given twice: name each run once.")
    return [_read(place, label) for place, label in zip(places, labels(places), strict=True)]


def labels(places: Sequence[Path], depth: int = 2) -> list[str]:
    """The shortest ends of the paths that differ, of `depth` parts (2: DATE/TIME) or more."""
    while True:
        found = ["/".join(place.parts[-depth:]).lstrip("/") or str(place) for place in places]
        if len(set(found)) == len(found) or depth > max(len(place.parts) for place in places):
            return found
        depth += 1


def _place(folder: str | Path) -> Path:
    place = (Path(folder) if Path(folder).is_dir() else resolve(folder)).resolve()
    if not place.is_dir():
        raise UserError(f"No such folder: {folder}. Give the folder of a run, such as logs/runs/DATE/TIME.")
    if not _leaves(place):
        below = sorted(
            {file.parent for file in place.glob("*/run.json")} | {f.parent for f in place.glob("*/*/run.json")}
        )
        hint = f" Runs below it: {', '.join(str(run) for run in below[-3:])}." if below else ""
        raise UserError(
            f"{folder} is no run's folder: it has neither {RECORD}, {CONFIG}, {LOG}, TensorBoard events, csv/metrics.csv "
            f"nor samples/.{hint} Give the folder that training named, such as logs/runs/DATE/TIME."
        )
    return place


def _leaves(place: Path) -> bool:
    return any((place / name).is_file() for name in (RECORD, CONFIG, LOG)) or any(
        next(place.glob(pattern), None) for pattern in (EVENTS, TABLES, PICTURES)
    )


def _read(place: Path, label: str) -> Run:
    run = Run(place, label)
    if record := _document(run, RECORD, json.loads, dict):
        run.record = record
    if config := _document(run, CONFIG, _yaml, dict):
        run.config = config
    run.config_text = _text(place / CONFIG) or ""
    if (place / OVERRIDES).is_file():
        run.overrides = [str(line) for line in _document(run, OVERRIDES, _yaml, list) or []]
    _read_log(run)
    _read_figures(run)
    return run


def _document(run: Run, name: str, parse: Callable[[str], Any], kind: type) -> Any:
    """The parsed content of a file; None and a note where there is none."""
    if not (run.folder / name).is_file():
        run.notes.append(f"{name} is missing: what it says of the run can't be shown.")
        return None
    text = _text(run.folder / name)
    try:
        content = parse(text or "")
    except Exception as error:  # what parsers raise on rubbish is not theirs to promise
        run.notes.append(f"{name} can't be read ({_first_line(error)}): half-written or damaged, left out.")
        return None
    if not isinstance(content, kind):
        run.notes.append(f"{name} holds a {type(content).__name__} where a {kind.__name__} was expected, left out.")
        return None
    return content


def _read_log(run: Run) -> None:
    if not (run.folder / LOG).is_file():
        run.notes.append(f"{LOG} is missing.")
        return
    run.log = _text(run.folder / LOG) or ""
    for line in run.log.splitlines():
        match = _LOG_LINE.match(line)
        if match and match[1] in ("WARNING", "ERROR", "CRITICAL") and match[2] not in run.log_warnings:
            run.log_warnings.append(match[2])


def _read_figures(run: Run) -> None:
    parts: list[Scalars] = []
    for file in sorted(run.folder.glob(EVENTS), key=lambda f: (f.name.split(".")[3], f.name)):  # by time of creation
        scalars, last, problem = read_events(file)
        parts.append(scalars)
        run.last_event = max((t for t in (run.last_event, last) if t is not None), default=None)
        if problem:
            run.notes.append(problem)
    by_events = {name: join([part[name] for part in parts if name in part]) for part in parts for name in part}
    tables: list[Scalars] = []
    for file in sorted(run.folder.glob(TABLES)):
        scalars, problem = read_csv(file)
        tables.append(scalars)
        if problem:
            run.notes.append(problem)
    by_tables = {name: join([part[name] for part in tables if name in part]) for part in tables for name in part}
    run.series = dict(sorted((by_tables | by_events).items()))
    if not run.series:
        run.notes.append("No curves: neither TensorBoard events nor csv/metrics.csv have any figures (yet).")
    for name, series in run.series.items():
        if lost := [step for step, value in zip(series.steps, series.values, strict=True) if not math.isfinite(value)]:
            run.notes.append(
                f"{name} is no finite number at {len(lost):,} of {len(series):,} steps, first at step {lost[0]:,}."
            )


def _text(path: Path) -> str | None:
    """At most the last 32 MiB; None where it can't be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _LOG_BYTES, 0))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return None


def _yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
