"""The command of a probe, made from its declaration: `lsa lanczos`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, Optional

import typer

from lsa import probe
from lsa.cli.show import print_result
from lsa.cli.study import PLAN
from lsa.probe import outline
from lsa.runtime import ranks
from lsa.runtime.errors import InputError

TRUST = "packages whose code may run, and datasets that may be fetched: my_nets,CIFAR10"


def command(name: str) -> Callable[..., None]:
    """A function that typer can read, made from a probe's declaration."""
    declared = outline.read(name)

    def measure(**given: Any) -> None:
        with ranks.joined():
            _measure(declared, {k: v for k, v in given.items() if v is not None})

    measure.__doc__ = declared.doc
    parameters = [*_selectors(declared), *_options(declared)]
    measure.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    measure.__annotations__ = {p.name: p.annotation for p in parameters}
    return measure


def _measure(declared: probe.Probe, given: dict[str, Any]) -> None:
    from lsa import project as projects
    from lsa.studies import load, measure, trajectory

    options = {k: given.pop(k) for k in list(given) if k in declared.options}
    planned = given.pop("plan", False)
    all_epochs = given.get("epochs", "final") == "all"
    shared: dict[str, Any] = {k: given.get(k) for k in ("project", "samples")}
    shared["device"] = given.get("device", "auto")
    shared["trust"] = tuple(filter(None, given.get("trust", "").split(",")))
    if declared.pair and not ("checkpoint_b" in given or "optimizer_b" in given):
        raise InputError(
            f"{declared.name} takes two checkpoints; name the second by optimizer_b=… or "
            "checkpoint_b=…"
        )
    sources = [
        load.load(
            given.get(f"checkpoint{suffix}"),
            optimizer=given.get(f"optimizer{suffix}"),
            seed=given.get(f"seed{suffix}"),
            **shared,
        )
        for suffix in _suffixes(declared)
        if suffix in ("", "_b")[: 1 + declared.pair]
        or given.keys() & {f"checkpoint{suffix}", f"optimizer{suffix}"}
    ]
    if "checkpoint" not in given:
        setting = projects.load(given.get("project", projects.DEFAULT))
        options = setting.options(declared, trajectory=all_epochs) | options
    if planned:
        print(_plan(probe.find(declared.name), options, sources[0], all_epochs))
        return
    step, call = declared.name, measure.measure
    if all_epochs:
        step, call = projects.TRAJECTORY + step, trajectory.measure_trajectory
    done = call(declared.name, *sources, rng_seed=given.get("rng_seed", 0), **options)
    if ranks.rank():
        return
    print_result(done, step)
    print(f"run  {done.run_id}")


def _plan(declared: probe.Probe, options: dict[str, Any], source: Any, all_epochs: bool) -> str:
    """What a probe will take, predicted from a gradient and products measured at its checkpoint."""
    from lsa import project as projects
    from lsa.landscape.derivatives import budget
    from lsa.studies import cost, fitting
    from lsa.studies.view import duration

    budget.from_environment()
    at = source.landscape
    sizes = source.training.n_samples, source.validation.n_samples
    rates = cost.measured(at, source.theta, *sizes, optimizer=source.recipe.rule.name)
    resolved = projects.resolve(declared, options, "options")
    predicted = cost.probing(declared, resolved, rates)
    if predicted is None:
        raise InputError(f"probe {declared.name} declares no work; add work=… to its @probe")
    each = " at each checkpoint" if all_epochs else ""
    least, most = map(duration, (predicted.least, predicted.most))
    between = f" ({least} to {most}, as the checkpoint is)" if least != most else ""
    n = at.n_samples
    short = fitting.shortfall(declared, resolved, rates, budget.free_memory() + rates.memory)
    return (
        f"{declared.name}: about {duration(predicted.seconds)}{between}{each}, "
        f"peak memory about {predicted.memory / 1e9:.1f} GB\n"
        f"measured here, for {n:,} samples: gradient {rates.gradient * n:.2g} s, "
        f"Hessian product {rates.product * n:.2g} s, "
        f"covariance product {rates.covariance * n:.2g} s" + (f"\nnote: {short}" if short else "")
    )


def _suffixes(declared: probe.Probe) -> dict[str, str]:
    """Suffix of the options that name a checkpoint → which one it is."""
    named = {"": "", "_b": " of the second checkpoint", "_c": " of the third checkpoint"}
    return dict(list(named.items())[: declared.most])


def _selectors(declared: probe.Probe) -> list[inspect.Parameter]:
    """Options that name the checkpoint or the several checkpoints."""
    address = "training run ID (a prefix is enough), models:/name/version or models:/name@alias"
    selectors = [_parameter("project", str, "project of the checkpoint", "digits")]
    for suffix, which in _suffixes(declared).items():
        text = f"{address}, instead of --optimizer{suffix.replace('_', '-')}"
        selectors += [
            _parameter(f"optimizer{suffix}", str, f"optimizer{which}: its newest checkpoint", None),
            _parameter(f"seed{suffix}", int, f"training seed{which}", "the project's first"),
            _parameter(f"checkpoint{suffix}", str, text, None),
        ]
    if declared.per_checkpoint:
        text = "final: that checkpoint; all: every one that its training kept, as one run"
        selectors.append(_parameter("epochs", Literal["final", "all"], text, "final"))
    return [
        *selectors,
        _parameter("samples", int, "size of the landscape's subset", "the project's"),
        _parameter("rng_seed", int, "seed of the probe's own randomness", "0"),
        _parameter("device", str, "auto, cpu, cuda, cuda:1, …", "auto"),
        _parameter("trust", str, TRUST, None),
        _parameter("plan", bool, PLAN, None),
    ]


def _options(declared: probe.Probe) -> list[inspect.Parameter]:
    return [
        _parameter(o.name, o.type, o.help, f"the project's, else {o.default}")
        for o in declared.options.values()
    ]


def _parameter(name: str, kind: Any, text: str, default: str | None) -> inspect.Parameter:
    """An option that is None unless given, so that project files can set defaults."""
    shown = typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=default or False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[kind], shown],  # noqa: UP045
    )
