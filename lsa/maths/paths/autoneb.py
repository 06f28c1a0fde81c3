"""AutoNEB: a minimum-energy path whose pivots are placed where the path needs them.

Paths are relaxed on mini-batches (`lsa.maths.paths.neb`) and judged on the full split by the
maximum of their dense energies: those at the pivots and at equally spaced points between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lsa.maths.paths.neb import Band, EnergyFunction, Report, nudged_elastic_band
from lsa.maths.paths.polyline import refine, segment_lengths
from lsa.runtime.errors import InputError

DenseEnergy = Callable[[Tensor], Tensor]
"""`energies(points (M, d)) -> (M,)`, on the full split; called for one segment at a time."""


class Cycle(NamedTuple):
    """One relaxation of the schedule."""

    steps: int
    lr: float


DRAXLER_2018 = (
    *[Cycle(1000, 0.1)] * 4,
    *[Cycle(2000, 0.1)] * 2,
    *[Cycle(1000, 0.01)] * 4,
    *[Cycle(1000, 0.001)] * 4,
)
"""Schedule for CIFAR networks in the configurations published with Draxler et al. 2018."""


@dataclass(frozen=True)
class CycleResult:
    """The result of one relaxation cycle."""

    lr: float
    pivots: int
    steps: int  # moves made, at most the cycle's budget
    grad_evals: int
    max_energy: float  # dense maximum after the cycle
    perp_grad_norm: float
    stop_reason: str


@dataclass(frozen=True)
class MinimumEnergyPath:
    """The path with the lowest maximum of its dense energies, and how it was found."""

    pivots: Tensor  # (P, d)
    alphas: Tensor  # (M,) fraction of arc length, 0 at a and 1 at b
    energies: Tensor  # (M,) dense energies
    origin: str  # "straight line", "start", "baseline 1", …, "cycle 1", …
    perp_grad_norm: float  # of this path, on its last mini-batch; nan if it was not relaxed
    converged: bool  # whether this path was relaxed to the tolerance
    stop_reason: str  # why the search ended, one plain sentence
    cycles: tuple[CycleResult, ...]
    grad_evals: int  # pivots at which `energy` was computed
    energy_evals: int  # points at which `dense_energy` was computed

    @property
    def max_energy(self) -> float:
        """Highest dense energy: between the samples the path may be a little higher."""
        return self.energies.max().item()


def auto_neb(
    energy: EnergyFunction,
    dense_energy: DenseEnergy,
    a: Tensor,
    b: Tensor,
    *,
    schedule: Sequence[Cycle] = DRAXLER_2018,
    initial_pivots: int = 3,
    insert_per_cycle: int = 2,
    threshold: float = 0.1,
    between: int = 9,
    momentum: float = 0.9,
    method: Literal["neb", "string"] = "neb",
    climbing: bool = True,
    tol: float = 1e-3,
    start: Tensor | None = None,
    baselines: Sequence[Tensor] = (),
    report: Report | None = None,
) -> MinimumEnergyPath:
    """Minimum-energy path from a to b: relax, add pivots where they are missing, repeat.

    Each cycle after the first adds pivots where the dense energies rise above the straight line
    between neighbouring pivots, then relaxes the band with infinitely stiff springs; in the last
    cycle the highest pivot climbs. The lowest path seen is kept, straight line and baselines
    included. Defaults are those of the CIFAR configurations published with Draxler et al. 2018.

    Args:
        energy: Energies and gradients of all pivots on one mini-batch, for the relaxation.
        dense_energy: Energies on the full split, by which paths are judged.
        a: One minimum, `(d,)`.
        b: The other.
        schedule: Steps and rate of every cycle.
        initial_pivots: Pivots between a and b on the straight line.
        insert_per_cycle: Most pivots added per cycle.
        threshold: Excess that calls for a pivot, as a share of the path's energy range.
        between: Dense points inside every segment.
        momentum: Heavy ball of the relaxation.
        method: "neb" or "string", see `nudged_elastic_band`.
        climbing: Whether the highest pivot climbs at last (Kolsbjerg et al. 2016, not Draxler).
        tol: Gradient across the path that ends a cycle early; tuned, see `nudged_elastic_band`.
        start: Path `(P, d)` to relax in place of the straight line, such as a trained curve.
        baselines: Other paths from a to b that the result must not exceed.
        report: Called as `report(done, total, text)`; steps saved by convergence count as done.

    Returns:
        The path. A non-finite energy ends the search; `stop_reason` says where it was met.

    Raises:
        InputError: Equal endpoints, an option out of range, or a path that does not run from a
            to b.
    """
    a, b = a.detach(), b.detach()
    _check(a, b, initial_pivots, insert_per_cycle, threshold, between)
    given = _given(a, b, initial_pivots, start, baselines)
    seen = [_judge(dense_energy, path, between, name) for name, path in given]
    current = seen[0] if start is None else seen[1]
    reason, cycles = current.trouble or "the schedule has no cycles", []
    relax = partial(nudged_elastic_band, energy, momentum=momentum, method=method, tol=tol)
    for number, (steps, lr) in enumerate(schedule, start=1):
        if current.trouble:
            break
        pivots = current.pivots
        if number > 1:
            pivots = insert_pivots(pivots, current.energies, threshold, insert_per_cycle)
        band = relax(
            pivots,
            steps=steps,
            lr=lr,
            climbing=climbing and number == len(schedule),
            spacing=segment_lengths(pivots),
            first_step=sum(cycle.grad_evals // cycle.pivots for cycle in cycles),
            report=_within(report, schedule, number),
        )
        current = _judge(dense_energy, band.pivots, between, f"cycle {number}", band)
        seen.append(current)
        cycles.append(_record(lr, band, current))
        reason = f"cycle {number} of {len(schedule)}: {current.trouble or band.stop_reason}"
        if band.stop == "not finite":
            break
    return _conclude(seen, tuple(cycles), reason)


def insert_pivots(pivots: Tensor, energies: Tensor, threshold: float, limit: int) -> Tensor:
    """Add pivots where a path rises most above the straight line between neighbouring pivots.

    Args:
        pivots: `(P, d)`.
        energies: Dense energies at `refine(pivots, n)`, shape `((P−1)(n+1)+1,)` with n ≥ 1.
        threshold: Least excess, as a share of the largest minus the smallest energy.
        limit: Most pivots to add; at most one per segment, the largest excesses first.

    Returns:
        `(P + added, d)`: the given pivots, and the worst point of each chosen segment.
    """
    parts = (len(energies) - 1) // (len(pivots) - 1)
    left, right = energies[:-1:parts], energies[parts::parts]
    f = torch.arange(1, parts, device=energies.device, dtype=energies.dtype) / parts
    inner = energies[:-1].view(-1, parts)[:, 1:]
    excess, worst = (inner - torch.lerp(left[:, None], right[:, None], f)).max(dim=1)
    least = threshold * (energies.max() - energies.min())
    order = excess.argsort(descending=True, stable=True).tolist()
    chosen = [i for i in order if excess[i] > least][:limit]
    rows = list(pivots)
    for i in sorted(chosen, reverse=True):
        rows.insert(i + 1, torch.lerp(rows[i], rows[i + 1], f[worst[i]].to(pivots.dtype)))
    return torch.stack(rows)


@dataclass(frozen=True)
class _Judged:
    """A path with its dense energies, and where one of them is not finite."""

    pivots: Tensor
    energies: Tensor
    origin: str
    band: Band | None
    trouble: str

    @property
    def height(self) -> float:
        return math.inf if self.trouble else self.energies.max().item()


def _judge(
    dense_energy: DenseEnergy, pivots: Tensor, between: int, origin: str, band: Band | None = None
) -> _Judged:
    """Evaluate a path one segment at a time, so that memory holds one segment's points."""
    parts = [dense_energy(refine(pivots[i : i + 2], between)[:-1]) for i in range(len(pivots) - 1)]
    energies = torch.cat([*parts, dense_energy(pivots[-1:])]).detach().double()
    bad, trouble = (~energies.isfinite()).nonzero().flatten(), ""
    if len(bad):
        segment = min(int(bad[0]) // (between + 1), len(pivots) - 2) + 1
        value = energies[bad[0]].item()
        trouble = f"energy is {value:g} between pivots {segment} and {segment + 1} of the {origin}"
    return _Judged(pivots, energies, origin, band, trouble)


def _record(lr: float, band: Band, judged: _Judged) -> CycleResult:
    return CycleResult(
        lr=lr,
        pivots=len(band.pivots),
        steps=band.steps,
        grad_evals=band.grad_evals,
        max_energy=judged.energies.max().item(),
        perp_grad_norm=band.perp_grad_norm,
        stop_reason=band.stop_reason,
    )


def _conclude(
    seen: Sequence[_Judged], cycles: tuple[CycleResult, ...], reason: str
) -> MinimumEnergyPath:
    best = min(reversed(seen), key=lambda path: path.height)  # of equals, the latest
    parts = len(best.energies) // (len(best.pivots) - 1)
    steps = segment_lengths(best.pivots).repeat_interleave(parts).cumsum(0)
    return MinimumEnergyPath(
        pivots=best.pivots,
        alphas=torch.cat([steps.new_zeros(1), steps / steps[-1]]),
        energies=best.energies,
        origin=best.origin,
        perp_grad_norm=best.band.perp_grad_norm if best.band else math.nan,
        converged=best.band is not None and best.band.stop == "converged",
        stop_reason=reason,
        cycles=cycles,
        grad_evals=sum(cycle.grad_evals for cycle in cycles),
        energy_evals=sum(len(path.energies) for path in seen),
    )


def _within(report: Report | None, schedule: Sequence[Cycle], number: int) -> Report | None:
    """Progress of a cycle as progress of the schedule."""
    if report is None:
        return None
    before = sum(cycle.steps for cycle in schedule[: number - 1])
    total = sum(cycle.steps for cycle in schedule)
    return lambda done, _, text: report(before + done, total, f"cycle {number}: {text}")


def _given(
    a: Tensor, b: Tensor, initial_pivots: int, start: Tensor | None, baselines: Sequence[Tensor]
) -> list[tuple[str, Tensor]]:
    """The straight line, the start if any, and the baselines, each with its name."""
    paths = [("start", start)] if start is not None else []
    paths += [(f"baseline {i}", path) for i, path in enumerate(baselines, start=1)]
    for name, path in paths:
        if path.ndim != 2 or path.shape[1:] != a.shape or len(path) < 2:
            raise InputError(f"{name} of shape {tuple(path.shape)}; give pivots (P, {len(a)})")
        if not (torch.equal(path[0], a) and torch.equal(path[-1], b)):
            raise InputError(f"{name} does not run from a to b; these must be its first and last")
    if start is not None and not (segment_lengths(start) > 0).all():
        raise InputError("start has neighbouring pivots that coincide; drop one of each pair")
    line = refine(torch.stack([a, b]), initial_pivots)
    return [("straight line", line)] + [(name, path.detach()) for name, path in paths]


def _check(
    a: Tensor, b: Tensor, initial_pivots: int, insert_per_cycle: int, threshold: float, between: int
) -> None:
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must be vectors of one length")
    if torch.equal(a, b):
        raise InputError("a and b are the same point; a path needs two different minima")
    if initial_pivots < 1 or between < 1 or insert_per_cycle < 0 or threshold < 0:
        raise InputError(
            f"initial_pivots={initial_pivots}, between={between}, "
            f"insert_per_cycle={insert_per_cycle}, threshold={threshold:g}; "
            "need the first two ≥ 1 and the last two ≥ 0"
        )
