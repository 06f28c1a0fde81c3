"""A result as a notebook shows it: its numbers with their errors, its notes and its figures."""

from __future__ import annotations

import contextlib

from lsa.figures.page import Cell, Section, as_fragment
from lsa.probe import Metric, Result


def html(result: Result) -> str:
    """A fragment of HTML; every text is escaped."""
    name = result.probe or "result"
    headings = ("metric", "value", "standard error", "unit")
    rows: list[tuple[Cell, ...]] = [_row(key, metric) for key, metric in result.metrics.items()]
    sections = [Section(name, headings=headings, rows=rows, level=4)]
    notes = list(result.notes)
    if not result.converged:
        notes.insert(0, "not converged")
    if notes:
        sections.append(Section("", headings=("notes",), rows=[(note,) for note in notes]))
    return as_fragment([*sections, *_figures(name, result)])


def _row(name: str, metric: Metric) -> tuple[str, ...]:
    errors = ", ".join(f"{error:.2g} ({source})" for source, error in metric.errors.items())
    return name, f"{metric.value:.6g}", errors, metric.unit


def _figures(name: str, result: Result) -> list[Section]:
    """The probe's drawing, where matplotlib is installed."""
    with contextlib.suppress(ModuleNotFoundError):
        from lsa.figures import draw

        drawn = draw.figures(name, result, name)
        return [Section("", file, figure=draw.png(figure)) for file, figure in drawn.items()]
    return []
