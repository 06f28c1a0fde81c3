"""The commands that show what there is: a run, the checkpoints, the probes.

Each prints text for people, or with `--json` one document with the keys that its help lists.
"""

from __future__ import annotations

import itertools
import json as jsons
import math
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Optional

import typer

from lsa import probe
from lsa.probe import outline
from lsa.probe.result import with_ends
from lsa.runtime.errors import printable

JSON = Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")]
# The columns of checkpoints that people compare by; then the first number of every other probe.
LEADING = (
    "final/val_accuracy",
    "lanczos/lambda_max",
    "sgd_noise/noise_ratio",
    "sgd_noise/noise_scale",
    "final/train_loss",
    "preconditioned/threshold_ratio",
    "auto_neb/path_loss",
)
# A number that another probe has measured too: it is listed where the other is missing.
AGAIN = {
    "sgd_noise/lambda_h": "lanczos/lambda_max",
    "perturbation/curvature_fit": "lanczos/lambda_max",
}
ERRORS = (
    "± is half a 95 % interval: two standard errors over the samples, probe vectors or subspaces; "
    "(a … b) is an interval that is not symmetric."
)
HEADER = {"project", "optimizer", "seed", "checkpoint", "checkpoint_b"}  # stands above


def show(
    run: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            help="run ID or its beginning; or models:/name/version for the training of a checkpoint"
        ),
    ] = None,
    project: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="project of the checkpoint", show_default="digits"),
    ] = None,
    optimizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="show the newest checkpoint of this optimizer, instead of a run"),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="training seed", show_default="the project's first"),
    ] = None,
    step: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="show the newest run of this probe on it, instead of the training"),
    ] = None,
    json: JSON = False,
) -> None:
    """Show a run: its step, parameters, numbers with standard errors, notes, figures, checkpoint.

    ± is half a 95 % interval, two standard errors, with its source. Of a probe's options, those
    that differ from the default are shown.

    Keys of --json: run, name, step, status, error, started (ISO 8601), seconds, project,
    optimizer, seed, checkpoints [{address, run}], parameters {name: {value, default}}, metrics
    {name: {value, unit, standard_errors {source: value}}}, notes, figures, artifacts (their
    folder). A number that JSON does not have is the text nan, inf or -inf.
    """
    from lsa.reports import records

    done = records.find(run, name=project, optimizer=optimizer, seed=seed, step=step)
    record = records.run(done)
    if json:
        print_json(record)
        return
    when = (record["started"] or "at no known time")[:16].replace("T", " ")
    _line("run", f"{record['run']}  {record['name']}")
    _line("step", f"{record['step'] or 'none of lsa'}")
    _line("status", f"{record['status']} (started {when} UTC, {record['seconds']:.3g} s)")
    if record["error"]:
        _line("error", record["error"].strip().partition("\n")[0])
    if record["project"]:
        seeded = "" if record["seed"] is None else f", seed {record['seed']}"
        _line("of", f"{record['project']}.{record['optimizer']}{seeded}")
    for checkpoint in record["checkpoints"]:
        _line("checkpoint", f"{checkpoint['address'] or 'deleted'}  run {checkpoint['run']}")
    for name, parameter in record["parameters"].items():
        default = parameter["default"]
        if name not in HEADER and parameter["value"] != default:
            _line("parameter", f"{name}={parameter['value']}" + _otherwise(default))
    numbers = {name: float(metric["value"]) for name, metric in record["metrics"].items()}
    for name, ends in with_ends(numbers):
        metric = record["metrics"][name]
        value = written(numbers[name], metric["standard_errors"], metric["unit"], ends)
        _line("metric", f"{name:36} {value}")
    for note in record["notes"]:
        _line("note", note)
    for figure in record["figures"]:
        _line("figure", figure)


def _line(kind: str, text: str) -> None:
    print(f"{kind:11} {printable(text)}")


def _otherwise(default: Any) -> str:
    return "" if default is None else f"  (default {default})"


def written(
    value: float,
    errors: Mapping[str, Any],
    unit: str = "",
    ends: tuple[float, float] | None = None,
) -> str:
    """A number, its interval or ± two of the standard errors that it has, and its unit."""
    if ends:
        return f"{value:.6g} {interval(*ends)}{unit and ' '}{unit}"
    known = "".join(f" ± {2 * float(error):.2g} ({source})" for source, error in errors.items())
    return f"{value:.6g}{known}{unit and ' '}{unit}"


def interval(low: float, high: float) -> str:
    """The ends of an interval, which may have no upper one."""
    return f"({low:.4g} … {'∞' if math.isinf(high) else f'{high:.4g}'})"


def checkpoints(
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="those of one project", show_default="all", metavar="PROJECT"),
    ] = None,
    project: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="list the checkpoints of this project alone", show_default="all"),
    ] = None,
    json: JSON = False,
) -> None:
    """List the registered checkpoints, with accuracy and the numbers that people compare by.

    ± is half a 95 % interval: two standard errors over the samples, probe vectors or subspaces.

    Keys of --json, a list of: address, project, optimizer, seed, epoch, run (of the training),
    metrics {name: {value, standard_errors {source: value}}}: all that is logged on the checkpoint.
    """
    from lsa.reports import records

    project = name or project
    listed = records.checkpoints(project)
    if json:
        print_json(listed)
        return
    if not listed:
        where = f" of project {project}" if project else ""
        print(f"no checkpoint{where} is registered; make one with: lsa train")
        return
    names = _columns({name for checkpoint in listed for name in checkpoint["metrics"]})
    numbers = [name.removeprefix("final/").replace("/", "\n") for name in names]
    headings = ["checkpoint", "seed", "epoch", *numbers]
    rows = [_row(checkpoint, names) for checkpoint in listed]
    fit = _fitting([headings, *rows])
    print_table(headings[:fit], [row[:fit] for row in rows])
    print(ERRORS)
    if fit < len(headings):
        left_out = ", ".join(names[fit - len(headings) :])
        print(f"A wider terminal also shows {left_out}; --json shows all.")


def _columns(present: Collection[str]) -> list[str]:
    """Names of the numbers to list: each quantity once, whichever probes have measured it."""
    declared = [outline.read(name) for name in probe.modules()]
    first = [
        f"{declaration.name}/{declaration.headline[0]}"
        for declaration in declared
        if declaration.headline
    ]
    led = {name.partition("/")[0] for name in LEADING if name in present}
    others = [name for name in first if name.partition("/")[0] not in led]
    return [
        name for name in (*LEADING, *others) if name in present and AGAIN.get(name) not in present
    ]


def _row(checkpoint: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cells = [checkpoint["address"], str(checkpoint["seed"]), str(checkpoint["epoch"])]
    metrics = checkpoint["metrics"]
    for name in names:
        number, low, high = (metrics.get(name + end) for end in ("", "_low", "_high"))
        errors = number["standard_errors"].values() if number else ()
        value = f"{float(number['value']):.4g}" if number else "–"
        if low and number:
            ends = float(low["value"]), float(high["value"]) if high else math.inf
            cells.append(f"{value} {interval(*ends)}")
        elif low:
            cells.append(f"> {float(low['value']):.4g}")
        else:
            cells.append(value + "".join(f" ± {2 * float(error):.2g}" for error in errors))
    return cells


def _fitting(lines: Sequence[Sequence[str]]) -> int:
    """Number of columns of a table that fit the terminal; all without a terminal."""
    room = shutil.get_terminal_size().columns
    fit = sum(end <= room for end in itertools.accumulate(_widths(lines)))
    return max(fit, 4) if sys.stdout.isatty() else len(lines[0])


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    """What each column of a table takes on the terminal, with the space between."""
    columns = zip(*lines, strict=True)
    return [3 + max(len(part) for cell in c for part in cell.split("\n")) for c in columns]


def probes(json: JSON = False) -> None:
    """List the probes, one line each.

    Keys of --json, a list of: name, summary, checkpoints (how many it takes), most_checkpoints
    (it may take), along_training, headline (names of metrics), options {name: {type, choices,
    default, help}}.
    """
    if json:
        from lsa.reports import records

        print_json(records.probes())
        return
    summaries = outline.summaries()
    width = max(map(len, summaries), default=0)
    for name, summary in summaries.items():
        print(f"{name:{width}}  {summary}")


def print_result(result: probe.Result, prefix: str) -> None:
    """One line per number with its unit and errors, then what the reader must know."""
    for name, ends in with_ends({name: m.value for name, m in result.metrics.items()}):
        metric = result.metrics[name]
        text = written(metric.value, metric.errors, metric.unit, ends)
        print(f"{f'{prefix}/{name}':36} {text}")
    if not result.converged:
        print("not converged")
    for note in result.notes:
        print(f"note: {note}")
    if any(metric.errors for metric in result.metrics.values()):
        print(ERRORS)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(jsons.dumps(document, indent=2, allow_nan=False))  # ASCII, for every terminal


def _cell(text: str) -> Any:
    """Text as it is: a name from a store is neither rich's markup nor a terminal's command."""
    from rich.text import Text

    return Text("\n".join(map(printable, text.split("\n"))))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table; one wider than the terminal continues below, with its first column again."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # A pipe or a file has no width, so that lines stay whole there.
    console = Console(width=None if sys.stdout.isatty() else 1000)
    widths = _widths([headings, *rows])
    beside = len(widths) == 1 or widths[0] + max(widths[1:]) <= console.width
    if not beside:
        widths[0] = max(8, console.width - max(widths[1:]))
    for k, part in enumerate(_parts(widths, console.width)):
        shown = None if k else title or None
        table = Table(title=shown, title_justify="left", box=box.SIMPLE_HEAD)
        for i in part:
            # Names are for copying: they are broken only where nothing would stand beside them.
            table.add_column(_cell(headings[i]), overflow="fold", no_wrap=i == 0 and beside)
        for row in rows:
            table.add_row(*(_cell(row[i]) for i in part))
        console.print(table)


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns of each part of a table: the first, and as many others as there is room for."""
    parts: list[list[int]] = [[0]]
    used = widths[0]
    for i, width in enumerate(widths[1:], 1):
        if len(parts[-1]) > 1 and used + width > room:
            parts.append([0])
            used = widths[0]
        parts[-1].append(i)
        used += width
    return parts
