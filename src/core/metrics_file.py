"""Write and read `metrics.csv`, which holds every number that a run logs.

One value per line, so that a new name needs no new column:

    step,name,value,time
    20,train/loss,0.3456,1767323045.123

`step` counts generator updates, `value` may be `nan` or `inf`, `time` is in seconds since 1970. The file is append-only: if
a killed run resumes in its folder, a line has a lower step than the one before it, and from that step on the later lines
count. As a table: `pandas.read_csv(file).pivot_table(index="step", columns="name", values="value")`.
"""

import csv
import io
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

NAME = "metrics.csv"
_FIELDS = ("step", "name", "value", "time")
_LONGEST_LINE = 1 << 16

Row = tuple[int, str, float, float]
"""Step, logged name, value, time in seconds since 1970 (0: unknown)."""


def append(file: Path, step: int, values: Mapping[str, float]) -> None:
    """Append `values` in one write. A partial last line, left by a kill or a full disk, is removed first."""
    now = f"{time.time():.3f}"
    rows = [(step, name, repr(float(value)), now) for name, value in values.items()]
    text = io.StringIO()
    with file.open("ab+", buffering=0) as stream:
        size = stream.tell()
        start = max(size - _LONGEST_LINE, 0)
        stream.seek(start)
        whole = start + stream.read().rfind(b"\n") + 1
        if whole < size:
            stream.truncate(whole)
        csv.writer(text, lineterminator="\n").writerows(rows if whole else [_FIELDS, *rows])
        stream.write(text.getvalue().encode("utf-8", "replace"))


def read(file: Path) -> Iterator[Row]:
    """Yield the rows in file order, skipping an incomplete last line and values that are not numbers.

    Also reads the tables of Lightning's CSVLogger, which have one column per name.
    """
    text = file.read_bytes().decode("utf-8", "replace")
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")):
        for name, value in [(row["name"], row["value"])] if "name" in row else row.items():
            try:
                if name not in ("step", "epoch"):
                    yield int(row["step"]), name, float(value), float(row.get("time") or 0)
            except (TypeError, ValueError):
                continue
