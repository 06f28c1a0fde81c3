"""Samples per pass, and how images lie, by a measurement: where the measured rules do not hold.

What is fastest here is kept on this disk by network, device, threads and data's shape: it is
measured once, and every later run takes the same. It changes results by rounding alone.
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

GAIN = 1.05  # by which each doubling or halving must be faster to be worth another
SAMPLES = 64  # timed at least, however few are in a pass
RUNS = 2  # of which the faster counts


class Choice(NamedTuple):
    """What is fastest."""

    chunk: int  # samples per pass
    layout: str


def fitted(landscape: Landscape) -> Landscape:
    """The landscape in passes of the size, and images in the layout, that are fastest here.

    Measured with Hessian products that keep nothing, which takes about as long as five to ten of
    them on 512 samples; or read, where it was measured before. A layout that the user has fixed
    stays.
    """
    key = _key(landscape)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    file = cache_folder() / "passes" / f"{name}.json"
    choice = _kept(file)
    if choice is None:
        choice = _measured(landscape)
        content = json.dumps({**key, **choice._asdict()})
        keep(file, lambda temporary: temporary.write_text(content, encoding="utf-8"))
    return _in_passes(landscape, choice, landscape.n_samples)


def _measured(landscape: Landscape) -> Choice:
    """The size in the usual layout, then the layout at that size."""
    n, usual = landscape.n_samples, landscape.layout
    chunk = fastest(
        lambda size: _seconds(landscape, Choice(size, usual)), min(landscape.chunk, n), n
    )
    if landscape.x.ndim != 4 or budget.fixed_layout():
        return Choice(chunk, usual)
    choices = [Choice(chunk, layout) for layout in budget.LAYOUTS]
    seconds = {choice: _seconds(landscape, choice) for choice in choices}
    best = min(choices, key=lambda choice: seconds[choice])
    return best if seconds[best] * GAIN < seconds[Choice(chunk, usual)] else Choice(chunk, usual)


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
    """Seconds that a Hessian product takes per sample, so chosen."""
    n = min(landscape.n_samples, max(choice.chunk, SAMPLES) // choice.chunk * choice.chunk)
    part = _in_passes(landscape, choice, n, memory=0)
    theta, times = flatten(part.model), []
    product = part.hessian(theta)
    for _ in range(RUNS):
        begun = time.perf_counter()
        try:
            product(theta)[0].item()
        except torch.OutOfMemoryError:
            return math.inf
        times.append(time.perf_counter() - begun)
    return min(times) / n


def _in_passes(
    landscape: Landscape, choice: Choice, samples: int, memory: int | None = None
) -> Landscape:
    x, y = landscape.x[:samples], landscape.y[:samples]
    return Landscape(
        landscape.model, x, y, landscape.loss_function, memory=memory, **choice._asdict()
    )


def _key(landscape: Landscape) -> dict[str, Any]:
    """What the fastest size depends on."""
    machine = provenance.machine(str(landscape.x.device))
    return {
        "torch": torch.__version__,
        "host": machine["lsa.host"],
        "device": machine["lsa.device_name"],
        "threads": machine["lsa.threads"],
        "modules": [type(module).__name__ for module in landscape.model.modules()],
        "parameters": [list(p.shape) for p in landscape.model.parameters() if p.requires_grad],
        "samples": landscape.n_samples,
        "sample": list(landscape.x.shape[1:]),
        "precision": str(landscape.x.dtype),
        "fixed_layout": budget.fixed_layout(),
    }


def _kept(file: Path) -> Choice | None:
    """What was measured before; None where nothing, or nothing sound, was kept."""
    try:
        content = documents.read_json(file)
        choice = Choice(content["chunk"], content["layout"])
    except (InputError, LookupError, TypeError):
        return None
    sound = isinstance(choice.chunk, int) and choice.chunk >= 1
    return choice if sound and choice.layout in list(budget.LAYOUTS) else None
