"""Results, checkpoints and studies as a notebook shows them.

A result has its numbers with their errors, its notes and its figures; the others have a table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from lsa.figures.page import Cell, Section, as_fragment
from lsa.probe import Metric, Result
from lsa.probe.result import beside, with_ends


def html(result: Result) -> str:
    """A fragment of HTML; every text is escaped."""
    name = result.probe or "result"
    headings = ("metric", "value", "standard error", "unit")
    numbers = {key: metric.value for key, metric in result.metrics.items()}
    rows: list[tuple[Cell, ...]] = [
        _row(key, result.metrics[key], ends) for key, ends in with_ends(numbers)
    ]
    sections = [Section(name, headings=headings, rows=rows, level=4)]
    notes = list(result.notes)
    if not result.converged:
        notes.insert(0, "not converged")
    if notes:
        sections.append(Section("", points=tuple(notes)))
    return as_fragment([*sections, *_figures(name, result)])


def facts(title: str, values: Mapping[str, str]) -> str:
    """A table of names and values, those that are empty left out; every text is escaped."""
    rows = ((name, value) for name, value in values.items() if value)
    return table(title, ("property", "value"), rows)


def table(title: str, headings: tuple[str, ...], rows: Iterable[tuple[Cell, ...]]) -> str:
    """A table under a heading; every text is escaped."""
    return as_fragment([Section(title, headings=headings, rows=list(rows), level=4)])


def _row(name: str, metric: Metric, ends: tuple[float, float] | None) -> tuple[str, ...]:
    errors = beside(metric, ends).removeprefix("standard error ")
    return name, f"{metric.value:.6g}", errors, metric.unit


def _figures(name: str, result: Result) -> list[Section]:
    """The probe's drawing, where matplotlib is installed and the result has all that it shows."""
    with contextlib.suppress(ModuleNotFoundError, KeyError):  # of a step, arrays stay in its run
        from lsa.figures import draw

        drawn = draw.figures(name, result, name)
        titles = [file.removesuffix(".png").replace("_", " ") for file in drawn]
        return [
            Section("", title, figure=draw.png(figure))
            for title, figure in zip(titles, drawn.values(), strict=True)
        ]
    return []
