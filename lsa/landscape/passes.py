"""Samples per pass, how images lie, product mode and threads, measured shortly on first use.

The rules of `budget` say where it starts. What is fastest here is kept on this disk
by network, device, threads and data's shape: it is measured once, and every later run takes the
same, so that a run repeated is the same to the last digit. It changes results by rounding alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lsa.landscape.derivatives import budget, modes
from lsa.landscape.derivatives.replay import EAGER
from lsa.landscape.landscape import Landscape, flatten
from lsa.runtime import documents, provenance
from lsa.runtime.cache import cache_folder, keep
from lsa.runtime.errors import InputError

log = logging.getLogger(__name__)

WORTH = 0.25  # seconds of a gradient: with more, a probe of a hundred takes longer than this does
GAIN = 1.1  # by which each doubling or halving, or another way, must be faster to be worth it
SAMPLES = 64  # timed at least, however few are in a pass
RUNS = 2  # of which the faster counts,
LONG = 1.0  # but one where it takes so many seconds, of which the own ones of a first call are few
AGREEMENT = 1e-3  # of its length may a product differ by mode; rounding is far less


class Choice(NamedTuple):
    """What is fastest."""

    chunk: int  # samples per pass
    layout: str
    threads: int
    mode: str  # of Hessian products that keep nothing

    def applied(self, landscape: Landscape, memory: int | None = None) -> Landscape:
        """The landscape so computed; threads are the process's (`budget.computing`)."""
        now = (landscape.chunk, landscape.layout, landscape.mode)
        if memory is None and now == (self.chunk, self.layout, self.mode):
            return landscape
        return landscape.computed(
            chunk=self.chunk, layout=self.layout, mode=self.mode, memory=memory
        )


def chosen(landscape: Landscape) -> Choice:
    """What is fastest for a landscape here.

    Measured with Hessian products that keep nothing, which takes about as long as five to ten of
    them on 512 samples; or read, where it was measured before. The rules' choice where a gradient
    takes less than `WORTH`, or where the user wants it so. What the user has fixed stays, but for
    a mode that needs derivatives which the network lacks.
    """
    threads, mode = torch.get_num_threads(), _fixed_mode(landscape) or modes.DEFAULT
    usual = Choice(landscape.chunk, landscape.layout, threads, mode)
    if budget.by_rules():
        return usual
    key = _key(landscape)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    file = cache_folder() / "passes" / f"{name}.json"
    if choice := _kept(file):
        return choice
    if not _is_long(landscape):
        return usual
    choice = _measured(landscape, usual)
    content = json.dumps({**key, **choice._asdict()})
    keep(file, lambda temporary: temporary.write_text(content, encoding="utf-8"))
    return choice


def _is_long(landscape: Landscape) -> bool:
    """Whether a gradient takes so long that a measurement pays."""
    n = min(landscape.n_samples, max(landscape.chunk, SAMPLES))
    part, theta = landscape.with_data(landscape.x[:n], landscape.y[:n]), flatten(landscape.model)
    try:
        part.gradient(theta)[0].item()  # warms up
        begun = time.perf_counter()
        part.gradient(theta)[0].item()
    except RuntimeError:  # as below
        return False
    return (time.perf_counter() - begun) * landscape.n_samples / n > WORTH


def _measured(landscape: Landscape, usual: Choice) -> Choice:
    """The size as is usual else, then at that size the layout, then the mode, then threads."""
    on_cpu = landscape.x.device.type == "cpu"
    best, n = usual, landscape.n_samples
    if not budget.fixed_chunk():
        first = min(landscape.chunk, n)
        most = n if on_cpu else first  # what fills a GPU leaves no memory for more
        start = best._replace(chunk=first)
        size = fastest(
            lambda size: _ratio(landscape, start._replace(chunk=size), start), first, most
        )
        if size != first:
            best = start._replace(chunk=size)
    images = landscape.x.ndim == 4 and budget.convolves(landscape.model)
    if images and not budget.fixed_layout():
        others = [name for name in budget.LAYOUTS if name != best.layout]
        best = _faster(landscape, best, [best._replace(layout=name) for name in others])
    if not budget.fixed_mode():
        others = [name for name in modes.MODES if name != best.mode]
        other = _faster(landscape, best, [best._replace(mode=name) for name in others])
        if other != best and _agree(landscape, best, other):
            best = other
    if on_cpu and not budget.fixed_threads():
        threads = fastest(
            lambda threads: _ratio(landscape, best._replace(threads=threads), best),
            usual.threads,
            usual.threads,
        )
        best = best._replace(threads=threads)
    return best


def fastest(seconds: Callable[[int], float], usual: int, most: int) -> int:
    """The size to which doubling, or else halving, from the usual one leads while it pays.

    Args:
        seconds: Of one sample in a pass of that size, in any unit.
        usual: Where to start, from 1 to `most`.
        most: The largest size.
    """
    least = before = seconds(usual)
    best = usual
    for next_ in (lambda size: 2 * size, lambda size: size // 2):
        size = next_(best)
        while 1 <= size <= most and (took := seconds(size)) * GAIN < least:
            best, least = size, took
            size = next_(size)
        if least < before:
            break
    return best


def _faster(landscape: Landscape, usual: Choice, others: Sequence[Choice]) -> Choice:
    """The fastest of the others if it is worth it, else the usual one."""
    ratios = [_ratio(landscape, other, usual) for other in others]
    least = min(ratios)
    return others[ratios.index(least)] if least * GAIN < 1 else usual


def _ratio(landscape: Landscape, choice: Choice, usual: Choice) -> float:
    """Time with a choice over that with the usual one, which is taken anew just before.

    A shared machine's speed may double within minutes. Infinite where either has no product.
    """
    if choice == usual:
        return 1.0
    before = _seconds(landscape, usual)
    return _seconds(landscape, choice) / before if before < math.inf else math.inf


def _agree(landscape: Landscape, *choices: Choice) -> bool:
    """Whether both give the same Hessian product; some derivative of PyTorch may be wrong."""
    theta = flatten(landscape.model)
    few = landscape.with_data(landscape.x[:SAMPLES], landscape.y[:SAMPLES])
    a, b = (choice.applied(few, memory=0).hessian(theta)(theta) for choice in choices)
    return bool((a - b).norm() <= AGREEMENT * a.norm())


def _fixed_mode(landscape: Landscape) -> str | None:
    """The mode that the user has fixed, if this network has what it needs."""
    mode, theta = budget.fixed_mode(), flatten(landscape.model)
    if mode in (None, modes.DEFAULT):  # what that lacks is for a probe to say
        return mode
    one = landscape.with_data(landscape.x[:1], landscape.y[:1])
    try:
        one.computed(chunk=1, layout=one.layout, mode=mode, memory=0).hessian(theta)(theta)
    except InputError as error:
        log.warning("%s; products are by %s", error, modes.DEFAULT)
        return modes.DEFAULT
    return mode


def _seconds(landscape: Landscape, choice: Choice) -> float:
    """Seconds that a Hessian product takes per sample, so chosen; infinite where there is none.

    That a network lacks derivatives, or memory, is for a probe to say that needs them.
    """
    n = min(landscape.n_samples, max(choice.chunk, SAMPLES) // choice.chunk * choice.chunk)
    part = choice.applied(landscape.with_data(landscape.x[:n], landscape.y[:n]), memory=0)
    theta, times = flatten(part.model), []
    # On a GPU the first calls are recorded for those that follow.
    runs = RUNS if part.x.device.type == "cpu" else RUNS + EAGER
    try:
        with budget.computing(choice.threads):
            product = part.hessian(theta)
            for _ in range(runs):
                begun = time.perf_counter()
                product(theta)[0].item()
                times.append(time.perf_counter() - begun)
                if times[0] > LONG:
                    break
    except (InputError, RuntimeError):  # out of memory is one, too
        return math.inf
    return min(times) / n


def _key(landscape: Landscape) -> dict[str, Any]:
    """What the fastest choice depends on."""
    machine = provenance.machine(str(landscape.x.device))
    return {
        "torch": torch.__version__,
        "host": machine["lsa.host"],
        "device": machine["lsa.device_name"],
        "available_threads": torch.get_num_threads(),
        "modules": [type(module).__name__ for module in landscape.model.modules()],
        "shapes": [list(p.shape) for p in landscape.model.parameters() if p.requires_grad],
        "samples": landscape.n_samples,
        "sample": list(landscape.x.shape[1:]),
        "precision": str(landscape.x.dtype),
        "fixed": [
            budget.fixed_chunk(),
            budget.fixed_layout(),
            budget.fixed_threads(),
            budget.fixed_mode(),
        ],
    }


def _kept(file: Path) -> Choice | None:
    """What was measured before; None where nothing, or nothing sound, was kept."""
    try:
        content = documents.read_json(file)
        choice = Choice(*(content[name] for name in Choice._fields))
    except (InputError, LookupError, TypeError):
        return None
    numbers = (choice.chunk, choice.threads)
    sound = all(isinstance(number, int) and number >= 1 for number in numbers)
    words = choice.layout in list(budget.LAYOUTS) and choice.mode in list(modes.MODES)
    return choice if sound and words else None
