"""The report of a project: one page rebuilt from the tracking store alone.

It shows every headline number per optimizer with its error, the findings that the seeds establish
and those that they do not, the curves of all checkpoints in one figure per probe, whether numbers
that must agree do, and where everything came from.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from lsa import plots, probe, tracking
from lsa.checks import Check, checks
from lsa.comparison import seeds_needed
from lsa.findings import TRAINING, Finding, findings, headline
from lsa.measurements import Measurement, measured, written
from lsa.project import Project

# The curve of each probe that tells checkpoints apart; of another probe, its first.
CURVES = {"lanczos": "density", "perturbation": "loss_along_top", "interpolation": "train_loss"}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } img { max-width: 100%; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .8rem .3rem 0; text-align: left; }
.wide { overflow-x: auto; } .bad { color: #b00020; font-weight: 600; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, text, a table and a figure, each of which may be missing."""

    title: str
    text: str = ""
    headings: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    figure: bytes = b""  # PNG


@dataclass(frozen=True)
class Report:
    """The same content three times."""

    html: str
    markdown: str
    content: dict[str, Any]  # for JSON


def report(setting: Project) -> Report:
    """Everything that the store knows of a project.

    Raises:
        InputError: Nothing measured, or measurements that are not alike.
    """
    all_of_it = measured(setting)
    found, agreed = findings(all_of_it), checks(all_of_it)
    sections = [
        *_tables(all_of_it),
        _finding_section(setting, found),
        *_figures(all_of_it),
        _check_section(agreed),
        _provenance(all_of_it),
    ]
    title = f"lsa: {setting.name}"
    content = {
        "project": setting.name,
        "findings": [
            {"metric": f.metric, **asdict(f.comparison), "verdict": f.comparison.verdict}
            for f in found
        ],
        "checks": [asdict(check) for check in agreed],
        "measurements": [
            {"step": m.step, "subject": m.subject, "seed": m.seed, "run": m.done.run_id}
            | {"numbers": m.numbers}
            for m in all_of_it
        ],
    }
    return Report(_html(title, sections), _markdown(title, sections), _storable(content))


def log(opened: tracking.Run, found: Report) -> None:
    """Store a report as artifacts of a run; the page opens in MLflow's UI."""
    opened.text(found.html, "report.html")
    opened.text(found.markdown, "report.md")
    opened.json(found.content, "report.json")


# --- sections -------------------------------------------------------------------------------------


def _tables(measurements: list[Measurement]) -> Iterator[Section]:
    """Accuracy and the headline numbers of each probe, one row per optimizer or pair."""
    groups: dict[str, list[str]] = {}
    for pairs in (False, True):
        for name in headline(measurements, pairs=pairs):
            step = "train" if name in TRAINING else name.partition("/")[0]
            groups.setdefault(step, []).append(name)
    for step, names in groups.items():
        mine = [m for m in measurements if m.step == step]
        subjects = dict.fromkeys(m.subject for m in mine)
        rows = []
        for subject in subjects:
            runs = [m for m in mine if m.subject == subject]
            cells = (written([m.numbers for m in runs], name) for name in names)
            rows.append((subject, str(len(runs)), *cells))
        short = (name.rpartition("/")[2] for name in names)
        yield Section(
            "Training" if step == "train" else step,
            "" if step == "train" else probe.find(step).summary,
            ("optimizer", "seeds", *short),
            rows,
        )


def _finding_section(setting: Project, found: list[Finding]) -> Section:
    n = len(setting.optimizers)
    pairs = n * (n - 1) // 2
    text = (
        "Optimizers are paired by seed: geometric mean of the ratio, or mean difference, with its "
        "95 % t interval, exact sign-flip p, adjusted by Holm over the pairs. With fewer than "
        f"{seeds_needed(pairs)} seeds nothing can be established; the project has "
        f"{len(setting.seeds)}. Read the sharpness beside the train loss: optimizers that stopped "
        "at different losses differ in curvature for that reason alone."
    )
    rows = [(f.metric, f.comparison.verdict) for f in found if f.comparison.seeds > 1]
    return Section("Findings", text, ("number", "verdict") if rows else (), rows)


def _figures(measurements: list[Measurement]) -> Iterator[Section]:
    """The main curve of every probe, all checkpoints or pairs in one figure."""
    for step in dict.fromkeys(m.step for m in measurements if m.step != "train"):
        lines: dict[str, list[Any]] = {}
        x_name = y_name = ""
        for m in (m for m in measurements if m.step == step):
            curves = tracking.artifact(m.done.run_id, f"{step}.json")["curves"]
            if not curves:
                continue
            y_name = CURVES[step] if CURVES.get(step) in curves else next(iter(curves))
            x_name = curves[y_name]["x_name"]
            x, y = ([float(v) for v in curves[y_name][axis]] for axis in ("x", "y"))
            lines.setdefault(m.subject, []).append((x, y))
        if lines:
            title = f"{step}: {y_name}".replace("_", " ")
            drawn = io.BytesIO()
            plots.overlay(title, x_name, y_name, lines).savefig(drawn, format="png")
            yield Section(title, figure=drawn.getvalue())


def _check_section(agreed: list[Check]) -> Section:
    broken = sum(not check.holds for check in agreed)
    rows = [
        (check.subject, str(check.seed), check.text, "holds" if check.holds else "DOES NOT HOLD")
        for check in sorted(agreed, key=lambda check: check.holds)
    ]
    text = f"{len(agreed)} agreements checked, {broken} do not hold."
    return Section("Cross-checks", text, ("optimizer", "seed", "check", "verdict"), rows)


def _provenance(measurements: list[Measurement]) -> Section:
    rows = []
    for m in measurements:
        tags = m.done.tags
        commit = tags.get("lsa.git.commit", "–")[:10]
        dirty = " (changed)" if tags.get("lsa.git.dirty") == "true" else ""
        version = f"lsa {tags.get('lsa.version.lsa')}, torch {tags.get('lsa.version.torch')}"
        place = f"{tags.get('lsa.device')}, {tags.get('lsa.threads')} thread(s)"
        row = (m.step, m.subject, str(m.seed), m.done.run_id, commit + dirty, version, place)
        rows.append(row)
    headings = ("step", "optimizer", "seed", "run", "commit", "versions", "device")
    return Section("Provenance", f"Store: {tracking.shown(tracking.store())}", headings, rows)


# --- renderings -----------------------------------------------------------------------------------


def _markdown(title: str, sections: list[Section]) -> str:
    parts = [f"# {title}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        if section.text:
            parts.append(section.text + "\n")
        if section.headings:
            lines = [section.headings, ("---",) * len(section.headings), *section.rows]
            cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
            parts.append("".join("| " + " | ".join(line) + " |\n" for line in cells))
        if section.figure:
            parts.append("(figure: see the HTML page)\n")
    return "\n".join(parts)


def _html(title: str, sections: list[Section]) -> str:
    """One self-contained page; every text is escaped."""
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        if section.figure:
            data = base64.b64encode(section.figure).decode()
            parts.append(
                f"<img alt='{html.escape(section.title)}' src='data:image/png;base64,{data}'>"
            )
            continue
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>")
        if not section.headings:
            continue
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.headings)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in section.rows)
        parts.append(f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>")
    return "\n".join(parts) + "</html>\n"


def _cell(text: str) -> str:
    mark = " class='bad'" if text == "DOES NOT HOLD" else ""
    return f"<td{mark}>{html.escape(text)}</td>"


def _storable(content: Any) -> Any:
    """The same with the names of numbers that JSON does not have."""
    if isinstance(content, dict):
        return {key: _storable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_storable(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return json.loads(json.dumps(content))
