"""A low path between two minima: the probe auto_neb, and the schedule of PyTorch-AutoNEB.

The schedule is that of the CIFAR configurations published with Draxler et al. 2018, with as many
gradients as the probe takes, and with four times as many, instead of its hundred thousands: 14
cycles at rates of 0.1, 0.01 and 0.001 from the straight line, three pivots first, a mini-batch for
each pivot by itself, no pivot that climbs. Those rates are for networks with batch norm; the one
here has none, so that a tenth of them is tried, too. All paths are judged alike, by the largest
loss at nine points inside each segment.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import setting
from benchmarks.timing import timed
from lsa.landscape import Landscape, flatten
from lsa.maths.paths import autoneb
from lsa.maths.paths.autoneb import DRAXLER_2018, Cycle, MinimumEnergyPath
from lsa.maths.paths.neb import EnergyFunction
from lsa.maths.paths.polyline import refine
from lsa.probes.auto_neb import auto_neb

EPOCHS, BATCH = 150, 32
BETWEEN = 9
FIRST, MORE = 3, 2  # pivots of the schedule: in its first cycle, and added in each later one
# Gradients of the published schedule, if every cycle adds as many pivots as it may.
MOST = sum(cycle.steps * (FIRST + MORE * i + 2) for i, cycle in enumerate(DRAXLER_2018))
# As many gradients as the probe takes, and the rates over those published.
SCHEDULES = ((1, 1.0), (1, 0.1), (4, 0.1))


def rows(name: str, x: Tensor, y: Tensor, **options: Any) -> list[dict[str, Any]]:
    """Per search: seconds, gradients, and how high its path and the straight line rise."""
    half = len(x) // 2
    x, y, held_out = x[:half], y[:half], (x[half:], y[half:])
    ends = [setting.network(name, x, y, EPOCHS, seed=seed, **options) for seed in (0, 1)]
    at, a = setting.landscape(ends[0], x, y)
    b = flatten(ends[1]).to(x.device)
    higher = max(at.loss(a), at.loss(b))

    def row(search: str, seconds: float, gradients: float, pivots: Tensor) -> dict[str, Any]:
        top = _highest(at, pivots)
        return {
            "search": search,
            "seconds": seconds,
            "gradients": int(gradients),
            "pivots": len(pivots),
            "highest loss": top,
            "above the higher end": top - higher,
        }

    rng = torch.Generator().manual_seed(0)
    found, seconds = timed(
        lambda: auto_neb(
            at, at, at.with_data(*held_out), a, b, rng, lambda *_: None, batch_size=BATCH
        )
    )
    nodes = sorted(name for name in found.arrays if name.startswith("node_"))
    pivots = torch.stack([torch.from_numpy(found.arrays[node]).to(a) for node in nodes])
    gradients = found.metrics["grad_evals"].value
    table = [
        row("straight line", 0.0, 0, torch.stack([a, b])),
        row("lsa", seconds, gradients, pivots),
    ]
    for times, rate in SCHEDULES:
        search = partial(_scheduled, at, a, b, rate)
        first = search(share := times * gradients / MOST)
        if _whole(first):  # with fewer pivots than there might have been
            share *= times * gradients / first.grad_evals
        path, seconds = timed(lambda search=search, share=share: search(share))
        title = f"schedule of PyTorch-AutoNEB, {times} × the gradients, {rate:g} × its rates"
        title += "" if _whole(path) else " (diverged)"
        table.append(row(title, seconds, path.grad_evals, path.pivots))
    return table


def _highest(at: Landscape, pivots: Tensor) -> float:
    return max(at.loss(point) for point in refine(pivots, BETWEEN))


def _whole(path: MinimumEnergyPath) -> bool:
    """Whether the search came to its end: only a loss that is not finite ends it early."""
    return len(path.cycles) == len(DRAXLER_2018)


def _scheduled(at: Landscape, a: Tensor, b: Tensor, rate: float, share: float) -> MinimumEnergyPath:
    """The search with a share of the published steps, at published rates times `rate`."""
    return autoneb.auto_neb(
        _batches_of_their_own(at),
        lambda points: torch.tensor([at.loss(point) for point in points], dtype=torch.float64),
        a,
        b,
        schedule=[
            Cycle(max(1, round(share * cycle.steps)), rate * cycle.lr) for cycle in DRAXLER_2018
        ],
        initial_pivots=FIRST,
        insert_per_cycle=MORE,
        between=BETWEEN,
        climbing=False,
        tol=0.0,
    )


def _batches_of_their_own(at: Landscape) -> EnergyFunction:
    """Every pivot draws a mini-batch for itself, as in PyTorch-AutoNEB."""
    gradient_on, rng = at.batch_gradient(), torch.Generator().manual_seed(0)

    def energy(points: Tensor, _: int) -> tuple[Tensor, Tensor]:
        losses, gradients = [], []
        for point in points:
            chosen = torch.randperm(at.n_samples, generator=rng)[:BATCH].to(at.x.device)
            loss, gradient = gradient_on(point, at.x[chosen], at.y[chosen])
            losses.append(loss)
            gradients.append(gradient)
        return torch.stack(losses), torch.stack(gradients)

    return energy
