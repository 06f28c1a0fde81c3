"""The commands that measure a whole project: study, mode_graph."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Literal, Optional

import typer

from lsa.cli.show import print_table, written
from lsa.runtime.errors import InputError, printable

PROJECT = Annotated[
    Optional[str],  # noqa: UP045 (typer reads it on every Python)
    typer.Option(help="project: a name in projects/ or a YAML file", show_default="digits"),
]
NAME = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(
        help="a name in projects/ or a YAML file", show_default="digits", metavar="PROJECT"
    ),
]
PLAN = "say what time and memory it will take, and measure nothing"
DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
WORKERS = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        help="number of steps that run side by side",
        show_default="1; with ray one per CPU of the cluster",
        min=1,
    ),
]


def study(
    name: NAME = None,
    *,
    project: PROJECT = None,
    device: DEVICE = "auto",
    workers: WORKERS = None,
    only: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="run these probes alone: lanczos,sgd_noise", show_default="all"),
    ] = None,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going/--stop",
            help="after a failed step: go on with the steps that do not need it, or stop",
        ),
    ] = True,
    engine: Annotated[
        Literal["processes", "ray"], typer.Option(help="where steps run: here, or as tasks of Ray")
    ] = "processes",
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="address of a Ray cluster (head:6379, auto)", show_default="a Ray of its own here"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would run and why, and run nothing")
    ] = False,
) -> None:
    """Train every optimizer of a project and run every probe; print the table."""
    from lsa.studies.engines import workers as processes

    if engine == "processes" and (workers or 1) > 1 and not dry_run:
        processes.prepare()
    from lsa import project as projects
    from lsa.studies import plan, study
    from lsa.tracking import runs, spool

    if address and engine != "ray":
        raise InputError(f"address={address} names a Ray cluster; add engine=ray")
    full_setting = projects.load(name or project or projects.DEFAULT)
    setting = full_setting if only is None else plan.only(full_setting, only.split(","))
    runs.end_stale("project", setting.name)
    outlook = plan.outlook(setting, device=device)
    if dry_run:
        for step in outlook:
            why = f"  ({step.why})" if step.why else ""
            print(printable(f"{step.state:8} {step.planned.label}{why}"))
    engine_maker, beside = None, 1 if workers is None else workers
    shared = os.cpu_count() or 1 if engine == "ray" and workers is None else beside
    forecast = plan.forecast(setting, outlook, device=device, workers=shared)
    if engine == "ray" and not dry_run:
        engine_maker, beside = _ray(full_setting.name, address, forecast.peaks, device, workers)
    _print_forecast(outlook, forecast, beside, local=engine_maker is None)
    if dry_run:
        return
    failed = None
    with _view(forecast.seconds, len(outlook), beside) as view:
        try:
            with study.study(
                full_setting,
                workers=beside,
                device=device,
                keep_going=keep_going,
                view=view,
                engine=engine_maker,
            ) as running:
                plan.run(setting, running)
        except (study.Failed, spool.NotLogged) as error:
            failed = error
    _print_end(full_setting, running)
    if failed:
        raise failed


def _ray(
    project: str, address: str | None, peaks: Any, device: str, workers: int | None
) -> tuple[Any, int]:
    """What makes a study's Ray engine, and how many steps then run side by side."""
    from lsa.studies.engines import ray_tasks

    offered = ray_tasks.connect(address)

    def demand(kind: str) -> ray_tasks.Demand:
        return ray_tasks.demand(kind, offered, peaks, device, workers)

    def ray_engine(run_id: str) -> ray_tasks.RayTasks:
        return ray_tasks.RayTasks(demand, project, run_id)

    return ray_engine, workers or max(1, int(offered.cpus))


def _print_forecast(outlook: Any, forecast: Any, workers: int, *, local: bool) -> None:
    """The plan in two lines: steps, time and memory."""
    from lsa.landscape.derivatives import budget
    from lsa.studies.view import duration

    due = sum(step.state != "reused" for step in outlook)
    line = f"{due} of {len(outlook)} steps to run"
    if due:
        per = f" each in {workers} processes" if workers > 1 else ""
        line += (
            f": about {duration(forecast.total / workers)}, peak memory about "
            f"{forecast.memory / 1e9:.1f} GB{per}"
        )
    if forecast.unknown:
        line += f"; without {', '.join(forecast.unknown)}, which declare no work"
    print(line, flush=True)
    free = budget.free_memory()
    if local and workers * forecast.memory > free:
        print(f"note: only {free / 1e9:.1f} GB of memory are free; take fewer workers", flush=True)


def _print_end(setting: Any, running: Any) -> None:
    """The tables of what is logged, how many steps ended how, and the steps that failed."""
    if not running.unlogged:
        _print_tables(setting)
    states = [handle.state for handle in running.handles]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    there = "" if running.unlogged else f" To compare them, open MLflow:\n    {_ui_command()}"
    print(f"{len(states)} steps: {counts}.{there}")
    for handle in running.failures:
        print(f"{handle.call.label}: {handle.error}\n    {handle.command}")


def _view(seconds: dict[str, float], total: int, workers: int) -> Any:
    """A live table on a terminal, lines elsewhere."""
    import contextlib

    from lsa.studies.view import Lines, Screen

    if sys.stderr.isatty():
        return Screen(seconds, total, workers)
    return contextlib.nullcontext(Lines(lambda line: print(line, flush=True), total))


def _print_tables(setting: Any) -> None:
    from lsa.reports import measurements, tables

    for table in tables.tables(measurements.measured(setting)):
        print_table(table.headings, table.cells, table.title)
    print(
        "± is half a 95 % interval: over the seeds; of one seed, two standard errors over the "
        "samples, probe vectors or subspaces."
    )


def _ui_command() -> str:
    """The command that opens the UI on the store in use."""
    import shlex
    from pathlib import Path

    from lsa.tracking import address, store

    uri = store.uri()
    if uri.startswith("http"):
        return f"open {store.shown(uri)}"
    beside = Path(sys.executable).with_name("mlflow")
    near = beside.is_relative_to(Path.cwd())
    program = str(beside.relative_to(Path.cwd())) if near else "mlflow"
    default = address.of_file(Path.cwd() / "mlflow.db")
    known = uri in (default, "sqlite:///mlflow.db")
    where = "" if known else f" --backend-store-uri {shlex.quote(store.shown(uri))}"
    return f"{program} ui{where}    # then http://127.0.0.1:5000"


def mode_graph(
    name: NAME = None,
    project: PROJECT = None,
    optimizers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="optimizers, comma-separated: sgd,adamw", show_default="all of the project"
        ),
    ] = None,
    seeds: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="training seeds, comma-separated: 0,1,2", show_default="the project's"),
    ] = None,
    device: DEVICE = "auto",
    workers: Annotated[
        int, typer.Option(help="number of processes that run steps side by side", min=1)
    ] = 1,
    plan: Annotated[bool, typer.Option("--plan", help=PLAN)] = False,
) -> None:
    """Barriers between all checkpoints of a project: line, aligned, curve, path, and their tree.

    Trains what is not trained and measures every pair by interpolation and auto_neb, with the
    options that the project gives them. What has been measured before is reused.
    """
    from lsa import project as projects
    from lsa.studies import mode_graph as graphs
    from lsa.studies import mode_study, study
    from lsa.studies import plan as plans

    setting = projects.load(name or project or projects.DEFAULT)
    chosen = optimizers.split(",") if optimizers else []
    numbers = _integers(seeds) if seeds else []
    if plan:
        steps = mode_study.planned(setting, optimizers=chosen, seeds=numbers)
        outlook = plans.outlook(setting, steps, device=device)
        forecast = plans.forecast(setting, outlook, device=device, workers=workers)
        _print_forecast(outlook, forecast, workers, local=True)
        return
    with (
        _view({}, 0, workers) as view,
        study.study(
            setting, kind=graphs.NAME, workers=workers, device=device, view=view
        ) as running,
    ):
        pairs = mode_study.run(setting, running, optimizers=chosen, seeds=numbers)
        if pairs is not None:
            print_table(graphs.HEADINGS, graphs.rows(pairs), "Loss above the higher end")
            for key, metric in pairs.metrics.items():
                print(f"{key:20} {written(metric.value, metric.errors, metric.unit)}")
            for note in pairs.notes:
                print(f"note: {note}")
    print("± in the table is two standard errors over the samples.")
    if running.opened:
        print(f"run  {running.opened.id}")


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"seeds={text!r} must be whole numbers, such as 0,1,2") from None
