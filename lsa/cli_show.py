"""The commands that show what there is: a run, the checkpoints, the probes.

Each prints text for people, or with `--json` one document with the keys that its help lists.
"""

from __future__ import annotations

import json as jsons
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Optional

import typer

from lsa import outline

JSON = Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")]
HEADER = {"project", "optimizer", "seed", "checkpoint", "checkpoint_b"}  # stands above


def show(
    run: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="run ID or its beginning, or models:/name/version: its training"),
    ] = None,
    project: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="project of the checkpoint", show_default="digits"),
    ] = None,
    optimizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="instead of a run: optimizer, its newest checkpoint"),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="training seed", show_default="the project's first"),
    ] = None,
    step: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="instead of the training: the newest run of this probe on it"),
    ] = None,
    json: JSON = False,
) -> None:
    """Show a run: its step, parameters, numbers with standard errors, notes, figures, checkpoint.

    Numbers are `value ± standard error (its source)`. Of a probe's options, those that differ
    from the default are shown.

    Keys of --json: run, name, step, status, error, started (ISO 8601), seconds, project,
    optimizer, seed, checkpoints [{address, run}], parameters {name: {value, default}}, metrics
    {name: {value, unit, standard_errors {source: value}}}, notes, figures, artifacts (their
    folder). A number that JSON does not have is the text nan, inf or -inf.
    """
    from lsa import records

    done = records.find(run, name=project, optimizer=optimizer, seed=seed, step=step)
    found = records.run(done)
    if json:
        _print_json(found)
        return
    when = found["started"][:16].replace("T", " ")
    _line("run", f"{found['run']}  {found['name']}")
    _line("step", f"{found['step'] or 'none of lsa'}")
    _line("status", f"{found['status']} (started {when} UTC, {found['seconds']:.3g} s)")
    if found["error"]:
        _line("error", found["error"].splitlines()[0])
    if found["project"]:
        seeded = "" if found["seed"] is None else f", seed {found['seed']}"
        _line("of", f"{found['project']}.{found['optimizer']}{seeded}")
    for one in found["checkpoints"]:
        _line("checkpoint", f"{one['address'] or 'deleted'}  run {one['run']}")
    for name, one in found["parameters"].items():
        default = one["default"]
        if name not in HEADER and one["value"] != default:
            _line("parameter", f"{name}={one['value']}" + _otherwise(default))
    for name, one in found["metrics"].items():
        value = written(float(one["value"]), one["standard_errors"], one["unit"])
        _line("metric", f"{name:36} {value}")
    for note in found["notes"]:
        _line("note", note)
    for figure in found["figures"]:
        _line("figure", figure)


def _line(kind: str, text: str) -> None:
    print(f"{kind:11} {text}")


def _otherwise(default: Any) -> str:
    return "" if default is None else f"  (default {default})"


def written(value: float, errors: Mapping[str, Any], unit: str = "") -> str:
    """A number with the standard errors that it has, by their source, and its unit."""
    known = "".join(f" ± {float(error):.2g} ({source})" for source, error in errors.items())
    return f"{value:.6g}{known}{unit and ' '}{unit}"


def checkpoints(
    project: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="those of one project", show_default="all"),
    ] = None,
    json: JSON = False,
) -> None:
    """List the registered checkpoints, with accuracy and the first headline number of each probe.

    The standard error behind ± is that over the samples, probe vectors or subspaces.

    Keys of --json, a list of: address, project, optimizer, seed, epoch, run (of the training),
    metrics {name: {value, standard_errors {source: value}}}: all that is logged on the checkpoint.
    """
    from lsa import records

    found = records.checkpoints(project)
    if json:
        _print_json(found)
        return
    if not found:
        where = f" of project {project}" if project else ""
        print(f"no checkpoint{where} is registered; make one with: lsa train")
        return
    present = {name for one in found for name in one["metrics"]}
    first = [f"{d['name']}/{d['headline'][0]}" for d in records.probes() if d["headline"]]
    names = [name for name in ("final/val_accuracy", *first) if name in present]
    headings = ["checkpoint", "seed", "epoch", "run", *(n.removeprefix("final/") for n in names)]
    print_table(headings, [_row(one, names) for one in found])


def _row(one: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cells = [one["address"], str(one["seed"]), str(one["epoch"]), one["run"][:8]]
    for name in names:
        number = one["metrics"].get(name)
        errors = number["standard_errors"].values() if number else ()
        value = f"{float(number['value']):.4g}" if number else "–"
        cells.append(value + "".join(f" ± {float(error):.2g}" for error in errors))
    return cells


def probes(json: JSON = False) -> None:
    """List the probes, one line each.

    Keys of --json, a list of: name, summary, checkpoints (how many it takes), along_training,
    headline (names of metrics), options {name: {type, choices, default, help}}.
    """
    if json:
        from lsa import records

        _print_json(records.probes())
        return
    summaries = outline.summaries()
    width = max(map(len, summaries), default=0)
    for name, summary in summaries.items():
        print(f"{name:{width}}  {summary}")


def _print_json(document: Any) -> None:
    print(jsons.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table as wide as the terminal, whose long headings break instead of being cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # A pipe or a file has no width.
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
