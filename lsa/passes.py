"""Samples per pass, how images lie and threads, by a short measurement on first use.

The rules of `lsa.derivatives.budget` say where it starts. What is fastest here is kept on this disk
by network, device, threads and data's shape: it is measured once, and every later run takes the
same, so that a run repeated is the same to the last digit. It changes results by rounding alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lsa import documents
from lsa.derivatives import budget
from lsa.errors import InputError
from lsa.landscape import Landscape, flatten
from lsa.memory import provenance
from lsa.training.images import cache_folder, keep

WORTH = 0.25  # seconds of a gradient: with more, a probe of a hundred takes longer than this does
GAIN = 1.05  # by which each doubling or halving must be faster to be worth another
SAMPLES = 64  # timed at least, however few are in a pass
RUNS = 2  # of which the faster counts


class Choice(NamedTuple):
    """What is fastest."""

    chunk: int  # samples per pass
    layout: str
    threads: int

    def applied(self, landscape: Landscape) -> Landscape:
        """The landscape in such passes and layout; threads are the process's (`budget`)."""
        if (self.chunk, self.layout) == (landscape.chunk, landscape.layout):
            return landscape
        return _in_passes(landscape, self, landscape.n_samples)


def chosen(landscape: Landscape) -> Choice:
    """What is fastest for a landscape here.

    Measured with Hessian products that keep nothing, which takes about as long as three to ten of
    them on 512 samples; or read, where it was measured before. The rules' choice where a gradient
    takes less than `WORTH`, or where the user wants it so; what the user has fixed stays.
    """
    usual = Choice(landscape.chunk, landscape.layout, torch.get_num_threads())
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
    """The size as is usual else, then at that size the layout, then threads."""
    on_cpu = landscape.x.device.type == "cpu"
    best, n = usual, landscape.n_samples
    if not budget.fixed_chunk():
        first = min(landscape.chunk, n)
        most = n if on_cpu else first  # what fills a GPU leaves no memory for more
        size = fastest(lambda size: _seconds(landscape, best._replace(chunk=size)), first, most)
        if size != first:
            best = best._replace(chunk=size)
    if landscape.x.ndim == 4 and not budget.fixed_layout():
        seconds = {
            layout: _seconds(landscape, best._replace(layout=layout)) for layout in budget.LAYOUTS
        }
        layout = min(seconds, key=lambda layout: seconds[layout])
        if seconds[layout] * GAIN < seconds[usual.layout]:
            best = best._replace(layout=layout)
    if on_cpu and not budget.fixed_threads():
        threads = fastest(
            lambda threads: _seconds(landscape, best._replace(threads=threads)),
            usual.threads,
            usual.threads,
        )
        best = best._replace(threads=threads)
    return best


def fastest(seconds: Callable[[int], float], usual: int, most: int) -> int:
    """The size to which doubling, or else halving, from the usual one leads while it pays.

    Args:
        seconds: Of one sample in a pass of that size.
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


def _seconds(landscape: Landscape, choice: Choice) -> float:
    """Seconds that a Hessian product takes per sample, so chosen; infinite where there is none.

    That a network lacks derivatives, or memory, is for a probe to say that needs them.
    """
    n = min(landscape.n_samples, max(choice.chunk, SAMPLES) // choice.chunk * choice.chunk)
    part = _in_passes(landscape, choice, n, memory=0)
    theta, times = flatten(part.model), []
    try:
        with budget.computing(choice.threads):
            product = part.hessian(theta)
            for _ in range(RUNS):
                begun = time.perf_counter()
                product(theta)[0].item()
                times.append(time.perf_counter() - begun)
    except (InputError, RuntimeError):  # out of memory is one, too
        return math.inf
    return min(times) / n


def _in_passes(
    landscape: Landscape, choice: Choice, samples: int, memory: int | None = None
) -> Landscape:
    return Landscape(
        landscape.model,
        landscape.x[:samples],
        landscape.y[:samples],
        landscape.loss_function,
        chunk=choice.chunk,
        memory=memory,
        layout=choice.layout,
    )


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
        "fixed": [budget.fixed_chunk(), budget.fixed_layout(), budget.fixed_threads()],
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
    return choice if sound and choice.layout in list(budget.LAYOUTS) else None
