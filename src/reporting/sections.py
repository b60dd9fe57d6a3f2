"""The body of a report: curves, pictures, warnings, result, configuration and environment."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from src.reporting.charts import Chart
from src.reporting.facts import flat, number, warnings
from src.reporting.markup import Html, element, items, joined, table
from src.reporting.pictures import Picture
from src.reporting.reading import Run
from src.reporting.summary import dot, heading

_NOT_COMPARED = ("paths.run_dir",)  # differs always


def curves(found: Sequence[Chart]) -> Html:
    """Empty frames that page.js draws into."""
    if not found:
        return _section("curves", "Curves", element("p", "No figures were logged.", cls="none"))
    cards = [
        element(
            "figure",
            element(
                "figcaption",
                element("h3", chart.title),
                element(
                    "button",
                    "log",
                    type="button",
                    cls="log",
                    data_plot=chart.key,
                    aria_pressed="false",
                    title="logarithmic axis",
                )
                if chart.logarithmic
                else None,
                element("p", chart.about) if chart.about else None,
            ),
            element("div", cls="plot", id=f"plot-{chart.key}"),
            cls="card chart",
        )
        for chart in found
    ]
    about = (
        "Bold: a running mean over a fortieth of the points where there are 120 or more, the points pale behind it. "
        "A star is the best value. Drag to zoom, double-click to return."
    )
    return _section(
        "curves",
        "Curves",
        element("p", about, cls="about"),
        element(
            "noscript", element("p", "The curves are drawn by JavaScript, which is switched off here.", cls="alarm")
        ),
        element("div", *cards, cls="charts"),
    )


def pictures(key: str, title: str, about: str, runs: Sequence[Run], found: Sequence[Sequence[Picture]]) -> Html:
    """All pictures below each other; page.js puts a slider over them on a screen."""
    if not any(found):
        return Html()
    columns = [
        element(
            "div",
            heading(run, i, len(runs) > 1),
            *(_picture(picture) for picture in own) if own else [element("p", "No pictures.", cls="none")],
            cls="sheets",
        )
        for i, (run, own) in enumerate(zip(runs, found, strict=True))
    ]
    return _section(
        key,
        title,
        element("p", about, cls="about"),
        element("div", *columns, cls="columns viewer" if len(runs) > 1 else "columns one viewer"),
    )


def _picture(picture: Picture) -> Html:
    image = element("img", src=picture.uri, alt=picture.caption, width=str(picture.width), height=str(picture.height))
    return element(
        "figure",
        image,
        element("figcaption", picture.caption),
        cls="sheet",
        data_step="end" if picture.step is None else str(picture.step),
        data_caption=picture.caption,
    )


def all_warnings(runs: Sequence[Run]) -> Html:
    found = [warnings(run) for run in runs]
    columns = [
        element(
            "div",
            heading(run, i, len(runs) > 1),
            items(own, cls="warnings") if own else element("p", "None.", cls="none"),
        )
        for i, (run, own) in enumerate(zip(runs, found, strict=True))
    ]
    return _section("warnings", "Warnings", element("div", *columns, cls="columns"))


def result(runs: Sequence[Run]) -> Html:
    """The last values of all figures, as the runs recorded them."""
    if not any(run.result for run in runs):
        return _section("result", "Result", element("p", "No run has recorded a result (yet).", cls="none"))
    fullest = sorted((run.result for run in runs), key=len, reverse=True)
    names = list(dict.fromkeys(name for known in fullest for name in known))
    rows = [[name, *(number(run.result[name]) if name in run.result else "–" for run in runs)] for name in names]
    about = element("p", "Last values, as run.json has them; the best ones are at the top of the page.", cls="about")
    return _section("result", "Result", about, table(_heads(runs, "figure"), rows))


def configuration(runs: Sequence[Run]) -> Html:
    parts: list[Html] = []
    if len(runs) > 1:
        parts += [element("h3", "Where the runs differ"), _differences(runs)]
    for i, run in enumerate(runs):
        parts.append(heading(run, i, len(runs) > 1))
        if run.overrides:
            parts.append(element("p", "Overrides: ", *(joined([element("code", text), " "]) for text in run.overrides)))
        if run.config_text:
            shown = {"open": ""} if len(runs) == 1 else {}
            parts.append(
                element("details", element("summary", "Whole configuration"), element("pre", run.config_text), **shown)
            )
        else:
            parts.append(element("p", "Not there.", cls="none"))
    return _section("config", "Configuration", *parts)


def environment(runs: Sequence[Run]) -> Html:
    found = [_environment(run) for run in runs]
    names = list(dict.fromkeys(name for known in found for name in known))
    rows = [[name, *(known.get(name, "–") for known in found)] for name in names]
    return _section("environment", "Environment", table(_heads(runs, ""), rows, cls="environment"))


def _environment(run: Run) -> dict[str, str]:
    record = run.record
    known = {"folder": str(run.folder)}
    if isinstance(command := record.get("command"), list):
        known["command"] = element("code", shlex.join(str(word) for word in command))
    if "git" in record:
        git = record["git"]
        known["git commit"] = (
            joined(
                [
                    element("code", str(git.get("commit"))),
                    "" if git.get("clean") else element("small", "with uncommitted changes", cls="doubt"),
                ]
            )
            if isinstance(git, Mapping)
            else "none: not run from a checkout"
        )
    for key in ("started", "ended", "resumed_from", "device", "processes", "python"):
        if record.get(key) is not None:
            known[key.replace("_", " ")] = (
                str(record[key]).replace("T", " ") if key in ("started", "ended") else str(record[key])
            )
    for group in ("packages", "data"):
        if isinstance(values := record.get(group), Mapping):
            before = "data: " if group == "data" else ""
            known |= {f"{before}{name}": _plain(value) for name, value in values.items()}
    return known


def _differences(runs: Sequence[Run]) -> Html:
    configs = [flat(run.config) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    missing = object()
    rows = []
    for name in names:
        values = [config.get(name, missing) for config in configs]
        if name not in _NOT_COMPARED and any(value != values[0] for value in values):
            rows.append([name, *("–" if value is missing else _plain(value) for value in values)])
    if not rows:
        return element("p", "Nowhere.", cls="none")
    return table(_heads(runs, "key"), rows)


def _heads(runs: Sequence[Run], first: str) -> list[str]:
    if len(runs) == 1:
        return [""]
    return [first, *(joined([dot(i), run.label]) for i, run in enumerate(runs))]


def _plain(value: Any) -> str:
    return "null" if value is None else number(value) if isinstance(value, float) else str(value)


def _section(key: str, title: str, *content: Html | None) -> Html:
    return element("section", element("h2", title), *content, id=key)
