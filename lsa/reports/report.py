"""The report of a project: one page rebuilt from the tracking store alone.

It shows the headline numbers of each optimizer with their errors, and the findings, established or
not. Then come one figure per probe with the curves of all checkpoints, checks of numbers that must
agree, and the origin of every measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lsa.figures import words
from lsa.figures.page import Cell, Link, Section, as_html, as_markdown
from lsa.project import TRAJECTORY, Project
from lsa.reports import doubts, links, summary
from lsa.reports.artifacts import read_trajectories
from lsa.reports.checks import Check, checks
from lsa.reports.extent import Extent, compared, counted, extent
from lsa.reports.findings import Finding, PairFinding, findings, pair_findings
from lsa.reports.insights import Insight, insights
from lsa.reports.measurements import Measurement, histories, measured
from lsa.reports.pictures import Picture, pictures
from lsa.reports.tables import Table, leading, tables
from lsa.runtime.documents import storable
from lsa.tracking import recording, store


@dataclass(frozen=True)
class Report:
    """A report as HTML, as Markdown and as JSON values."""

    html: str
    markdown: str
    content: dict[str, Any]  # for JSON


def report(setting: Project) -> Report:
    """Everything that the store knows of a project.

    Raises:
        InputError: Nothing measured, or measurements that are not alike.
    """
    everything = measured(setting)
    trajectories = read_trajectories(everything)
    headline = tables(everything)
    claims = insights(setting, everything, trajectories, histories(everything, "val/accuracy"))
    results, pairs = findings(everything, trajectories), pair_findings(everything)
    drawn, agreed = list(pictures(everything, trajectories)), checks(everything)
    runs = [_run(m) for m in everything]
    points = summary.established(claims, results, pairs)
    known = extent(everything)
    open_question = summary.nearest(known, results)
    sections = [
        *_start(setting, everything, points, open_question, drawn),
        *_figures(drawn[1:]),
        *_numbers(headline),
        *_notes(everything),
        *_pairs(known, claims, results, pairs),
        _check_section(agreed),
        _provenance(runs),
    ]
    title = f"lsa: {setting.name}"
    content = {
        "project": setting.name,
        "established": points,
        "nearest": open_question,
        "tables": [asdict(table) for table in headline],
        "insights": [asdict(picture) | {"verdict": picture.verdict} for picture in claims],
        "findings": [picture.content for picture in results],
        "pairs": [picture.content for picture in pairs],
        "figures": [{"title": picture.title, "caption": picture.caption} for picture in drawn],
        "checks": [asdict(check) for check in agreed],
        "measurements": [
            run | {"converged": m.converged, "numbers": m.numbers}
            for run, m in zip(runs, everything, strict=True)
        ],
    }
    return Report(as_html(title, sections), as_markdown(title, sections), storable(content))


def log(opened: recording.Run, report_made: Report, explorer: str) -> None:
    """Store a report and the explorer's page (HTML) as artifacts of a run, for MLflow's UI."""
    opened.text(report_made.html, "report.html")
    opened.text(report_made.markdown, "report.md")
    opened.json(report_made.content, "report.json")
    opened.text(explorer, "explorer.html")


# --- sections -------------------------------------------------------------------------------------


def _start(
    setting: Project,
    everything: Sequence[Measurement],
    points: Sequence[str],
    open_question: str,
    drawn: Sequence[Picture],
) -> Iterator[Section]:
    """The first screen: what was compared, what is established, one table, one picture."""
    shown = tuple(points[: summary.SHOWN])
    more = len(points) - len(shown)
    if points:
        said = "Established" + (f", with {more} more under Pairs:" if more else ":")
    elif extent(everything).pairs:
        said = f"No difference between the optimizers is established. {open_question}"
    else:
        said = open_question
    yield Section("In short", f"{compared(setting, everything)}\n{said}", points=shown)
    table = leading(everything)
    rows: list[tuple[Cell, ...]] = [tuple(cells) for cells in table.cells]
    text = f"{open_question}\n{summary.ERRORS}" if points and open_question else summary.ERRORS
    text += "\nEvery checkpoint, and what lies between two: the explorer beside this page, which "
    text += f"lsa explore {setting.name} writes as well."
    yield Section("", headings=tuple(table.headings), rows=rows)
    yield Section("", text)
    for picture in drawn[:1]:
        yield Section("", f"{picture.title}. {picture.caption}", figure=picture.png)


def _numbers(headline: Sequence[Table]) -> Iterator[Section]:
    yield Section("All numbers", "± is half the width of a 95 % interval, as said at the top.")
    for table in headline:
        rows: list[tuple[Cell, ...]] = [tuple(cells) for cells in table.cells]
        first = len(table.headings) - len(table.names)
        named = [f"{words.quantity(name)}\n{name}" for name in table.names]
        headings = (*table.headings[:first], *named)
        yield Section(table.title, table.text, headings, rows, level=3)
        if table.notes:
            yield _folded_notes(f"Notes on {table.title}", table.notes)


def _folded_notes(title: str, notes: Sequence[tuple[str, str]]) -> Section:
    rows: list[tuple[Cell, ...]] = [tuple(note) for note in notes]
    return Section("", headings=("of", "note"), rows=rows, folded=f"{title} ({len(rows)})")


def _notes(everything: Sequence[Measurement]) -> Iterator[Section]:
    """Notes on the trajectories, whose numbers stand in figures alone."""
    for step in dict.fromkeys(m.step for m in everything if m.step.startswith(TRAJECTORY)):
        runs = [m for m in everything if m.step == step]
        rows = [("all", text) for text in doubts.shared(runs)] + doubts.others(runs)
        failed = doubts.unconverged(runs)
        rows = [("", failed)] * bool(failed) + rows
        if rows:
            yield _folded_notes(f"Notes on {step.removeprefix(TRAJECTORY)} during training", rows)


def _pairs(
    known: Extent,
    claims: Sequence[Insight],
    results: Sequence[Finding],
    pairs: Sequence[PairFinding],
) -> Iterator[Section]:
    text = (
        "Optimizers are paired by training seed: geometric mean of the ratio, or mean difference, "
        "with its 95 % t interval and exact sign-flip p, adjusted by Holm over the pairs of a "
        f"number. Each number is a family of its own. {known.limit}"
    )
    yield Section("Pairs", text if known.pairs else known.limit)
    text = (
        "Claims of the literature, each established only if it holds for every pair that it speaks "
        "of, by that pair's own test."
    )
    yield Section("Claims", text, level=3)
    rows = [
        (claim.name, "\n".join((claim.claim, *claim.evidence)), claim.verdict) for claim in claims
    ]
    headings = ("claim", "evidence", "verdict")
    unasked = sum(bool(claim.missing) for claim in claims)
    why = f", {unasked} of them for want of measurements" if unasked else ""
    yield from _split(headings, rows, [claim.established for claim in claims], "claims", why)
    text = (
        "Curvature falls and rises with the train loss, so it is compared at the last epoch and at "
        "equal train loss: along the trajectories, at the largest final loss among the optimizers "
        "of a seed, or else by an analysis of covariance over the seeds. A difference counts only "
        "where both are established the same way. Eigenvalues and traces of the Hessian are not "
        "invariant when layers are rescaled without changing the network's function: a lower λ_max "
        "alone is no flatter minimum."
    )
    headings = ("number", "at the last epoch", "at equal train loss", "verdict")
    if results:
        yield Section("Every pair of optimizers", text, level=3)
        rows = [
            (_both(f.metric), _with(f.comparison.statement, f.doubt), f.at_equal_loss or "–",
             f.verdict)
            for f in results
        ]  # fmt: skip
        yield from _split(headings, rows, [f.established for f in results], "comparisons")
    text = (
        "A barrier is a largest height and never below 0; there is one where it exceeds 0 by two "
        "standard errors over the samples, at more seeds than chance explains. That of a path is "
        "of the lowest path found: it bounds the barrier between the minima from above."
    )
    if pairs:
        rows = [
            (_both(p.metric), _with(p.level.statement, p.doubt), p.level.verdict or "–")
            for p in pairs
        ]
        yield Section("Between the optimizers", text, level=3)
        untested = [p.level.established or not p.level.side for p in pairs]
        yield from _split(("number", "pair", "verdict"), rows, untested, "pairs")


def _both(metric: str) -> str:
    return f"{words.quantity(metric)}\n{metric}"


def _with(statement: str, doubt: str) -> str:
    return f"{statement}\n{doubt}" if doubt else statement


def _split(
    headings: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    shown: Sequence[bool],
    what: str,
    why: str = "",
) -> Iterator[Section]:
    """A table of those that are to be seen at once, and one of the others, folded."""
    at_once = [row for row, seen in zip(rows, shown, strict=True) if seen]
    others = [row for row, seen in zip(rows, shown, strict=True) if not seen]
    if at_once:
        yield Section("", headings=headings, rows=_named(at_once))
    if others:
        yield Section(
            "",
            headings=headings,
            rows=_named(others),
            folded=f"{len(others)} of {len(rows)} {what} not established{why}",
        )


def _named(rows: Iterable[tuple[str, ...]]) -> list[tuple[Cell, ...]]:
    """Rows that do not repeat the number's name."""
    cells: list[tuple[Cell, ...]] = []
    before = ""
    for name, *rest in rows:
        cells.append(("" if name == before else name, *rest))
        before = name
    return cells


def _figures(drawn: Sequence[Picture]) -> Iterator[Section]:
    if drawn:
        yield Section("Figures")
    for picture in drawn:
        yield Section(picture.title, picture.caption, figure=picture.png, level=3)


def _check_section(agreed: Sequence[Check]) -> Section:
    broken = sum(not check.holds for check in agreed)
    rows: list[tuple[Cell, ...]] = [
        (check.subject, str(check.seed), check.text, "holds" if check.holds else "DOES NOT HOLD")
        for check in sorted(agreed, key=lambda check: check.holds)
    ]
    held = {0: ": all hold", 1: ": 1 does not hold"}.get(broken, f": {broken} do not hold")
    text = f"{counted(len(agreed), 'agreement')} checked{held if agreed else ''}."
    headings = ("optimizer", "seed", "check", "verdict") if rows else ()
    return Section("Cross-checks", text, headings, rows)


def _provenance(runs: Sequence[dict[str, Any]]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        names = ("step", "subject", "seed", "commit", "versions", "device", "data")
        step, subject, seed, *rest = (str(run[name]) for name in names)
        rows.append((step, subject, seed, Link(run["run"], run["link"]), *rest))
    headings = ("step", "optimizer", "seed", "run", "commit", "versions", "device", "data")
    text = f"Store: {store.shown(store.uri())}"
    if not links.served():
        text += ". The links lead to MLflow's UI on this machine "
        text += f"({links.LOCAL}), once it runs: mlflow ui"
    return Section("Provenance", text, headings, rows)


# --- content --------------------------------------------------------------------------------------


def _run(m: Measurement) -> dict[str, Any]:
    """Origin of a measurement: run, code, versions and machine."""
    tags = m.done.tags
    dirty = " (changed)" if tags.get("lsa.git.dirty") == "true" else ""
    return {
        "step": m.step,
        "subject": m.subject,
        "seed": m.seed,
        "run": m.done.run_id,
        "link": links.of_run(m.done),
        "commit": tags.get("lsa.git.commit", "–")[:10] + dirty,
        "versions": f"lsa {tags.get('lsa.version.lsa')}, torch {tags.get('lsa.version.torch')}",
        "device": f"{tags.get('lsa.device')}, {tags.get('lsa.threads')} thread(s)",
        "data": m.done.data[:12] or "–",
    }
