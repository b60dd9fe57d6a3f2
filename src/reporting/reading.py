"""Read a run from the files in its folder. Missing or broken files become notes; only a folder without a run raises."""

import io
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from src.core import metrics_file
from src.core.errors import UserError
from src.core.folder_lock import owner_of
from src.core.metrics_file import Row
from src.core.weights import resolve

log = logging.getLogger(__name__)

RECORD, CONFIG, OVERRIDES, LOG = "run.json", ".hydra/config.yaml", ".hydra/overrides.yaml", "run.log"
TABLES, EVENTS = (metrics_file.NAME, "csv/metrics.csv"), "events.out.tfevents.*"
"""`csv/`: where `logger=csv` used to write, before every run had its own table."""

Series = dict[int, float]
"""Step -> value (can be NaN or infinite), steps ascending."""


@dataclass
class Run:
    """The content of a run's files, neither escaped nor validated."""

    folder: Path
    label: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[Any] = field(default_factory=list)
    log: str = ""
    series: dict[str, Series] = field(default_factory=dict)
    """By logged name, including the values of the runs that this one resumed."""
    resumed_at: int = 0
    """Step of the other run's checkpoint that this one started from."""
    times: list[float] = field(default_factory=list)
    """Timestamps of all logged numbers, in seconds since 1970."""
    notes: list[str] = field(default_factory=list)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the runs in these folders; a sweep's folder stands for all its jobs. Raises UserError for a folder that is missing,
    not a run folder, or given twice."""
    places = [place for folder in folders for place in _sweep_runs(Path(folder)) or [_run_folder(folder)]]
    if twice := [place for place in places if places.count(place) > 1]:
        raise UserError(f"{twice[0]} is given twice: name each run once.")
    ends = ["/".join(place.parts[-2:]) for place in places]
    runs = [_read(place) for place in places]
    for run, end in zip(runs, ends, strict=True):
        run.label = end if ends.count(end) == 1 else str(run.folder)
    return runs


def _sweep_runs(folder: Path) -> list[Path]:
    """Return the run folders in a sweep's folder, logs/multiruns/DATE/TIME, by number; none for other folders."""
    folder = (folder if folder.is_dir() else resolve(folder)).resolve()
    found = [file.parent for file in folder.glob("*/run.json") if file.parent.name.isdigit()]
    return sorted(found, key=lambda place: int(place.name))


def _run_folder(folder: str | Path) -> Path:
    place = (Path(folder) if Path(folder).is_dir() else resolve(folder)).resolve()
    names = (RECORD, CONFIG, LOG, *TABLES, EVENTS, "samples/step_*.png")
    if not any(next(place.glob(name), None) for name in names):
        problem = f"it has none of {', '.join(names)}" if place.is_dir() else "there is no such folder"
        below = sorted(str(file.parent) for name in ("*/run.json", "*/*/run.json") for file in place.glob(name))
        hint = f" Runs below it: {', '.join(below[-3:])}." if below else ""
        raise UserError(
            f"{folder} is not a run folder: {problem}. Give one such as logs/runs/DATE/TIME, or that of a sweep, "
            f"logs/multiruns/DATE/TIME.{hint}"
        )
    return place


def _read(place: Path) -> Run:
    run = Run(place)
    run.record = _read_document(run, RECORD, json.loads, {})
    run.config = _read_document(run, CONFIG, yaml.safe_load, {})
    if run.record.get("status") == "running" and not owner_of(place):
        run.notes.append(
            "run.json says `running`, but no process on this machine holds the folder: it was killed, or runs elsewhere."
        )
    run.overrides = _read_document(run, OVERRIDES, yaml.safe_load, [])
    run.log = _read_document(run, LOG, str, "")
    rows = _logged_rows(run)
    run.times = [time for *_, time in rows if 0 < time < 1e10]
    run.series = join([*_earlier_rows(run), *rows])
    for name, series in run.series.items():
        if lost := [step for step, value in series.items() if not math.isfinite(value)]:
            run.notes.append(f"{name} is not finite at {len(lost):,} of {len(series):,} steps, first at {lost[0]:,}.")
    return run


def _logged_rows(run: Run) -> list[Row]:
    rows: list[Row] = []
    tables = [run.folder / name for name in TABLES if (run.folder / name).is_file()]
    try:
        rows.extend(metrics_file.read(tables[0]) if tables else _events(run.folder))  # keeps the rows before an error
    except Exception as error:  # readers raise all kinds of errors
        run.notes.append(f"Only part of the logged numbers can be read: {error}.")
    return rows


def _read_document(run: Run, name: str, parse: Callable[[str], Any], empty: Any) -> Any:
    """Return the parsed content of a file (first 1 and last 31 MiB of a long one); on failure add a note and return `empty`."""
    try:
        with (run.folder / name).open("rb") as file:
            start = file.read(1 << 20)
            file.seek(max(file.seek(0, io.SEEK_END) - (31 << 20), len(start)))
            content = parse((start + file.read()).decode("utf-8", "replace"))
        if not isinstance(content, type(empty)):
            raise TypeError(f"it holds a {type(content).__name__}")
        return content
    except Exception as error:  # as above
        run.notes.append(f"{name} can't be read, so its content is not shown: {error}")
        return empty


def join(rows: Iterable[Row]) -> dict[str, Series]:
    """Return curves by name from rows in the order they were written.

    A step below that of the previous row means a restart from an earlier state: values from that step on are dropped.
    """
    found: dict[str, Series] = {}
    last = 0
    for step, name, value, _ in rows:
        if step < last:
            found = {key: {s: v for s, v in series.items() if s < step} for key, series in found.items()}
        found.setdefault(name, {})[step] = value
        last = step
    return {name: dict(sorted(found[name].items())) for name in sorted(found) if found[name]}


def _events(folder: Path) -> Iterator[Row]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for file in sorted(folder.glob(EVENTS)):  # names begin with the creation time
        log.warning("No metrics.csv: reading %s instead, which is slow (about 7 minutes for 1 GB).", file)
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value" and value.tag != "hp_metric":
                    yield event.step, value.tag, value.simple_value, event.wall_time


def _earlier_rows(run: Run) -> Iterator[Row]:
    """Return the rows of the runs that this one continues, oldest run first, each up to the checkpoint that was resumed."""
    earlier, known, last, parts = run, {run.folder}, math.inf, list[list[Row]]()
    while origin := _resumed_run(earlier, known):
        place, step = origin
        if not parts:
            run.resumed_at = step
        known.add(place)
        last = min(last, step)
        earlier = Run(place)
        earlier.log = _read_document(earlier, LOG, str, "")
        parts.append([row for row in _logged_rows(earlier) if row[0] <= last])
    return itertools.chain.from_iterable(reversed(parts))


def _resumed_run(run: Run, known: Set[Path]) -> tuple[Path, int] | None:
    """Return the run that this one resumed, and the step. Read from run.log, which has every start; run.json has only one."""
    starts = (re.findall(words, run.log) for words in (r"Resuming from (.+)", r"Resuming at step (\d+)"))
    for checkpoint, step in zip(*starts, strict=False):
        folder = Path(checkpoint).parent.parent
        moved = run.folder.parent.parent / folder.parent.name / folder.name  # if all runs were copied elsewhere
        for place in (folder.resolve(), moved):
            if place not in known and (place / RECORD).is_file():
                return place, int(step)
    return None
