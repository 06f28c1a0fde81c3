"""Language models: Hessian products over a gradient, top eigenvalues by library, growth.

Rows come one by one, so that a run that is ended early leaves what it has measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks import gpt, language_eigenvalues
from benchmarks.language_eigenvalues import Setting
from benchmarks.timing import peak, timed
from benchmarks.within import failed, within
from lsa.landscape import Landscape, objectives

TITLES = {
    "language": "GPTs: time and memory of a Hessian product over those of a gradient",
    "language-eigenvalues": "GPTs: three largest eigenvalues",
    "language-growth": "GPTs: growth with context, sequences and parameters",
}
STEPS = 30  # of AdamW before anything is measured
ROUNDS = 5
KEPT = 16 << 30  # bytes: every graph fits
WAYS = (
    "gradient",
    "exact product, graphs kept",
    "exact product, nothing kept",
    "product from gradients",
)
COMPILED = ("gradient, compiled", "product from compiled gradients")
Row = dict[str, Any]


class Case(NamedTuple):
    """A network of `gpt.SHAPES` and its data."""

    network: str
    sequences: int
    context: int


CASES = (Case("0.8M", 4, 128), Case("10.7M", 4, 256))
CASES_ON_CARD = (
    Case("124M", 2, 256),
    Case("10.7M", 8, 256),
    Case("0.8M", 16, 128),
    Case("124M", 2, 1024),
)


class Options(NamedTuple):
    """Of the whole benchmark."""

    device: str = "cpu"
    networks: Sequence[str] = ()  # of `gpt.SHAPES`; all that there are cases of
    rivals: Sequence[str] = ()
    seconds: float = math.inf  # for everything; what comes later is left out
    limit: float = math.inf  # seconds for one library to find its eigenvalues
    compiling: float = 0.0  # seconds for `torch.compile`; 0: not tried


def tables(options: Options) -> Iterator[tuple[str, Row]]:
    """Rows, each with its key in `TITLES`."""
    ends = time.monotonic() + options.seconds
    cases = CASES if options.device == "cpu" else CASES_ON_CARD
    cases = [c for c in cases if not options.networks or c.network in options.networks]
    for case in cases:
        for row in products(case, options.device):
            yield "language", row
    for row in growth(cases, options.device, ends):
        yield "language-growth", row
    for case in {c.network: c for c in cases[::-1]}.values():  # the shortest context of each
        at = setting(case, options.device)
        for row in language_eigenvalues.rows(at, options.rivals, options.limit, ends):
            yield "language-eigenvalues", {"network": _title(case), **row}
    for case in cases:
        seconds = min(options.compiling, ends - time.monotonic())
        if case.network != "0.8M" and seconds > 0:
            for row in products(case, options.device, compiling=seconds):
                yield "language", row


def setting(case: Case, device: str, steps: int = STEPS) -> Setting:
    """A network after some steps of training, and its data."""
    shape = gpt.SHAPES[case.network]._replace(context=case.context)
    model = gpt.trained(shape, steps, case.sequences, lr=3e-4, device=device)
    ids = gpt.text(case.sequences, shape.context + 1, shape.vocabulary)
    return Setting(model, ids.to(device))


# --- one product ---------------------------------------------------------------------------------


def products(case: Case, device: str, *, compiling: float = 0.0) -> Iterator[Row]:
    """Per way: seconds (of the CPU, where that computes), and time and memory over a gradient's.

    The gradient is that of the network as it trains, with fused attention. Memory is what is added
    to network, θ and the vector, from the first call on; a gradient that fits into what the process
    holds already adds none, and then there is no ratio. Where `torch.compile` has seconds for it,
    the ways are those that go through what it made.
    """
    at = setting(case, device)
    tasks, added = {}, {}
    for label in (WAYS[0], *COMPILED) if compiling else WAYS:
        row = {"network": _title(case), "what": label, "gradients": math.nan}
        try:
            with within(compiling if label in COMPILED else math.inf):
                make = _task(at, label)
                (tasks[label], _), _, added[label] = peak(lambda make=make: _twice(make))
        except failed as error:
            yield row | {"seconds": math.nan, "MB": math.nan, "of a gradient's": _why(error)}
    seconds = _alternate(tasks, device)
    for label, taken in seconds.items():
        if compiling and label == WAYS[0]:
            continue
        yield {
            "network": _title(case),
            "what": label,
            "gradients": taken / seconds[WAYS[0]],
            "seconds": taken,
            "MB": added[label] / 1e6,
            "of a gradient's": added[label] / added[WAYS[0]] if added[WAYS[0]] else math.nan,
        }


def _title(case: Case) -> str:
    return f"GPT {case.network}, {case.sequences} × {case.context:,} tokens"


def _why(error: BaseException) -> str:
    return f"fails: {str(error).splitlines()[0][:90]}" if str(error) else type(error).__name__


def _task(at: Setting, label: str) -> Callable[[], Callable[[], Any]]:
    """What makes the task; the data are counted before."""
    model: Any = torch.compile(at.model) if "compiled" in label else at.model
    way = "exact" if label.startswith("exact") else "gradients"
    landscape = Landscape(
        model,
        [(at.ids[:, :-1], at.ids[:, 1:])],
        objective=objectives.per_token(shift=False),
        copy=False,
        memory=KEPT if label.endswith("graphs kept") else 0,
        products=way,
    )
    theta, _ = landscape.theta, landscape.n_samples
    if label.startswith("gradient"):
        return lambda: lambda: landscape.gradient(theta)
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)

    def make() -> Callable[[], Any]:
        product = landscape.hessian(theta)
        return lambda: product(v)

    return make


def _twice(make: Callable[[], Callable[[], Any]]) -> tuple[Callable[[], Any], None]:
    """The task after two calls: what is kept is built, and a step is found."""
    task = make()
    task()
    task()
    return task, None


def _alternate(
    tasks: dict[str, Callable[[], Any]], device: str, rounds: int = ROUNDS
) -> dict[str, float]:
    """Median seconds of each task over rounds that run all in turn; on a CPU, its own."""
    took: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            began = time.process_time()
            _, seconds = timed(task)
            took[name].append(time.process_time() - began if device == "cpu" else seconds)
    return {name: median(seconds) for name, seconds in took.items()}


# --- growth --------------------------------------------------------------------------------------


def growth(cases: Sequence[Case], device: str, ends: float) -> Iterator[Row]:
    """Seconds and memory by one size at a time, with the exponents from one to the next."""
    if not cases:
        return
    largest = max(cases, key=lambda c: list(gpt.SHAPES).index(c.network)).network
    length = gpt.SHAPES[largest].context
    context = [Case(largest, 1, length * n // (1 if device != "cpu" else 2)) for n in (1, 2, 4, 8)]
    sequences = [Case(largest, n, length) for n in (1, 2, 4, 8)]
    networks = dict.fromkeys(c.network for c in cases)
    parameters = [Case(name, 2, 128) for name in gpt.SHAPES if name in networks]
    for name, sizes in (
        ("context", context),
        ("sequences", sequences),
        ("parameters", parameters if len(parameters) > 1 else []),
    ):
        before: dict[str, tuple[float, float, float]] = {}
        for case in sizes:
            if time.monotonic() > ends:
                return
            at = setting(case, device, steps=0)
            size = {
                "context": case.context,
                "sequences": case.sequences,
                "parameters": sum(p.numel() for p in at.model.parameters()),
            }[name]
            for label in WAYS:
                row: Row = {"network": _title(case), "grows": name, "size": size, "what": label}
                now, why = _one(at, label, device)
                found = (math.nan, math.nan) if now is None else now
                last = before.get(label)
                yield row | {
                    "seconds": found[0],
                    "MB": found[1] / 1e6,
                    "exponent of time": _exponent(last, (size, *found), 1),
                    "of memory": why or _exponent(last, (size, *found), 2),
                }
                before[label] = (size, *found)


def _one(at: Setting, label: str, device: str) -> tuple[tuple[float, float] | None, str]:
    try:
        (task, _), _, added = peak(lambda: _twice(_task(at, label)))
        return (_alternate({label: task}, device, 3)[label], float(added)), ""
    except failed as error:
        return None, _why(error)


def _exponent(last: tuple | None, now: tuple, i: int) -> float:
    if last is None or not (last[i] > 0 and now[i] > 0):
        return math.nan
    return math.log(now[i] / last[i]) / math.log(now[0] / last[0])
