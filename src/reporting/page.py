"""One HTML file that needs nothing else: styles, plotly.js, curves and pictures are inside it."""

import json
from collections.abc import Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from src.reporting.charts import charts
from src.reporting.figures import draw, in_script
from src.reporting.markup import Html, element, joined
from src.reporting.pictures import rfid_sheets, samples
from src.reporting.reading import Run
from src.reporting.sections import all_warnings, configuration, curves, environment, pictures, result
from src.reporting.summary import summary

MAX_SAMPLES, MAX_RFID_SHEETS = 12, 4
"""Pictures of a run where it is alone; several runs share them."""

# Nothing is fetched, whatever a run's files say.
_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


def page(runs: Sequence[Run]) -> str:
    """The same files make the same page."""
    found = charts(runs)
    sheets = [samples(run, _share(MAX_SAMPLES, runs)) for run in runs]
    rfid = [rfid_sheets(run, _share(MAX_RFID_SHEETS, runs)) for run in runs]
    sections = {
        "Curves": curves(found),
        "Samples": pictures(
            "samples",
            "Samples",
            "Originals above reconstructions by the EMA weights, always of the same images.",
            runs,
            sheets,
        ),
        "rFID sheets": pictures(
            "rfid-sheets",
            "Sheets of the rFID evaluations",
            "Rows of originals, their reconstructions, and the differences times 4.",
            runs,
            rfid,
        ),
        "Warnings": all_warnings(runs),
        "Result": result(runs),
        "Configuration": configuration(runs),
        "Environment": environment(runs),
    }
    title = ", ".join(f"{run.name} {run.label}" for run in runs)
    figures = ",".join(f"{json.dumps(chart.key)}:{draw(chart, runs)}" for chart in found)
    return "<!DOCTYPE html>\n" + element(
        "html",
        element(
            "head",
            Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            element("title", title),
            element("style", Html(_beside("page.css"))),
        ),
        element(
            "body",
            _top(runs, [name for name, section in sections.items() if section]),
            element("main", summary(runs), *sections.values()),
            element(
                "footer", "Made by src/report.py from the files in ", ", ".join(str(run.folder) for run in runs), "."
            ),
            element("script", Html(in_script("{" + figures + "}")), type="application/json", id="figures"),
            element("script", Html(get_plotlyjs())) if found else None,
            element("script", Html(_beside("page.js"))),
        ),
        lang="en",
    )


def _top(runs: Sequence[Run], names: Sequence[str]) -> Html:
    links = [element("a", name, href="#" + _ids[name]) for name in names]
    heading = "Training run" if len(runs) == 1 else f"{len(runs)} training runs"
    return element("header", element("h1", heading), element("nav", joined(links)), cls="top")


_ids = {
    "Curves": "curves",
    "Samples": "samples",
    "rFID sheets": "rfid-sheets",
    "Warnings": "warnings",
    "Result": "result",
    "Configuration": "config",
    "Environment": "environment",
}


def _share(most: int, runs: Sequence[Run]) -> int:
    return max(most // len(runs), 2)


def _beside(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
