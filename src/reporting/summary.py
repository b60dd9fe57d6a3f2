"""The top of a report: how each run went, what to doubt, and what could not be read."""

from collections.abc import Sequence

from src.reporting.facts import Fact, facts, status, untrained
from src.reporting.figures import PALETTE
from src.reporting.markup import Html, element, items, joined, table
from src.reporting.reading import Run

_GOOD, _BAD = ("finished",), ("failed",)


def summary(runs: Sequence[Run]) -> Html:
    """A card for each run; a table of the same facts where there are several."""
    cards = element("div", *(_card(run, i, len(runs) > 1) for i, run in enumerate(runs)), cls="runs")
    if len(runs) == 1:
        return element("section", cards, id="summary")
    return element("section", cards, element("h3", "Side by side"), _comparison(runs), id="summary")


def dot(place: int) -> Html:
    """The colour of a run's curves."""
    return element("span", cls="dot", style=f"background:{PALETTE[place % len(PALETTE)]}")


def heading(run: Run, place: int, several: bool) -> Html:
    """The run's name where there are several."""
    return element("h3", dot(place), run.label) if several else Html()


def _card(run: Run, place: int, several: bool) -> Html:
    state = status(run)
    kind = "good" if state in _GOOD else "bad" if state in _BAD else "going"
    said = {
        "running": "running, or ended without a word",
        "unknown": "unknown: run.json says nothing of it",
    }.get(state, state)
    title = element(
        "header",
        dot(place) if several else None,
        element("h2", run.name),
        element("span", run.label, cls="path"),
        element("span", said, cls=f"badge {kind}"),
    )
    error = run.record.get("error")
    return element(
        "article",
        title,
        element("p", element("strong", "It ended with: "), str(error), cls="alarm") if error else None,
        _untrained(run),
        element("dl", *(_tile(fact) for fact in facts(run)), cls="tiles"),
        _notes(run),
        cls="card run",
    )


def _untrained(run: Run) -> Html | None:
    parts = untrained(run)
    if not parts:
        return None
    return element(
        "p",
        element("strong", "UNTRAINED: "),
        ", ".join(parts),
        ". The figures of this run say nothing of the method.",
        cls="alarm",
    )


def _tile(fact: Fact) -> Html:
    return element(
        "div",
        element("dt", fact.name),
        element("dd", fact.value, cls="value long" if len(fact.value) > 14 else "value"),
        element("dd", fact.detail, cls="detail") if fact.detail else None,
        element("dd", fact.doubt, cls="doubt") if fact.doubt else None,
        cls="tile",
    )


def _notes(run: Run) -> Html | None:
    if not run.notes:
        return None
    return element("div", element("strong", "Notes on the files of this run"), items(run.notes), cls="notes")


def _comparison(runs: Sequence[Run]) -> Html:
    by_run = [{fact.name: fact for fact in facts(run)} for run in runs]
    names = list(dict.fromkeys(name for known in sorted(by_run, key=len, reverse=True) for name in known))
    rows: list[list[str]] = [["experiment", *(run.name for run in runs)], ["status", *(status(run) for run in runs)]]
    rows += [[name, *(_cell(known.get(name)) for known in by_run)] for name in names]
    rows.append(
        [
            "untrained",
            *(", ".join(untrained(run)) or ("nothing" if run.record and run.config else "unknown") for run in runs),
        ]
    )
    return table(["", *(joined([dot(i), run.label]) for i, run in enumerate(runs))], rows, cls="wide")


def _cell(fact: Fact | None) -> str:
    if fact is None:
        return "–"
    return joined(
        [
            element("b", fact.value),
            element("small", fact.detail) if fact.detail else None,
            element("small", fact.doubt, cls="doubt") if fact.doubt else None,
        ]
    )
