"""Samples per pass by a measurement, for machines on which the measured rules do not hold.

The number that is fastest here is kept on this disk by network, device, threads and data's shape:
it is measured once, and every later run takes the same. It changes results by rounding alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lsa import documents
from lsa.errors import InputError
from lsa.landscape import Landscape, flatten
from lsa.memory import provenance
from lsa.training.images import cache_folder, keep

GAIN = 1.05  # by which each doubling or halving must be faster to be worth another
SAMPLES = 64  # timed at least, however few are in a pass
RUNS = 2  # of which the faster counts


def fitted(landscape: Landscape) -> Landscape:
    """The landscape in passes of the size that is fastest on its device.

    Measured with Hessian products that keep nothing, which takes about as long as five to ten of
    them on 512 samples; or read, where it was measured before.
    """
    n, key = landscape.n_samples, _key(landscape)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    file = cache_folder() / "passes" / f"{name}.json"
    chunk = _kept(file)
    if chunk is None:
        chunk = fastest(lambda size: _seconds(landscape, size), min(landscape.chunk, n), n)
        content = json.dumps({**key, "chunk": chunk})
        keep(file, lambda temporary: temporary.write_text(content, encoding="utf-8"))
    return _in_passes(landscape, chunk, n)


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


def _seconds(landscape: Landscape, chunk: int) -> float:
    """Seconds that a Hessian product takes per sample, in passes of that size."""
    n = min(landscape.n_samples, max(chunk, SAMPLES) // chunk * chunk)
    part = _in_passes(landscape, chunk, n, memory=0)
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
    landscape: Landscape, chunk: int, samples: int, memory: int | None = None
) -> Landscape:
    x, y = landscape.x[:samples], landscape.y[:samples]
    return Landscape(landscape.model, x, y, landscape.loss_function, chunk=chunk, memory=memory)


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
    }


def _kept(file: Path) -> int | None:
    """What was measured before; None where nothing, or nothing sound, was kept."""
    try:
        chunk = documents.read_json(file)["chunk"]
    except (InputError, LookupError, TypeError):
        return None
    return chunk if isinstance(chunk, int) and chunk >= 1 else None
