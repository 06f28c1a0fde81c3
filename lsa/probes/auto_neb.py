"""The minimum-energy path between two checkpoints."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lsa.landscape import Landscape
from lsa.landscape.batched import Batched
from lsa.landscape.energies import SampledPoints, gradient_by_batches, mini_batches
from lsa.landscape.heads import find_head
from lsa.maths.paths import autoneb
from lsa.maths.paths.autoneb import Cycle, MinimumEnergyPath
from lsa.maths.paths.curves import TrainedCurve, train_curve
from lsa.maths.paths.polyline import (
    Points,
    head_collapse_path,
    length_ratio,
    refine,
    segment_lengths,
    tangents,
)
from lsa.probe import AtMost, Curve, Metric, Report, Result, Sizes, Work, probe
from lsa.runtime.errors import InputError

GRID = np.linspace(0, 1, 61)  # fractions of a path's length, the same for all pairs
# For the cost, as seen: vectors like θ that a band holds per pivot, and rows of a basis that take
# as long as the algebra of a pivot's step, and as a point that is made and told from others.
BAND, PIVOT, POINT = 14, 20, 8


def _work(
    at: Sizes,
    *,
    curve_steps: int,
    pivots: int,
    cycles: int,
    steps: int,
    batch_size: int,
    between: int,
    **_: Any,
) -> Work:
    """The band at its full number of pivots, two more per cycle; every new path judged densely."""
    most = pivots + 2 * max(0, cycles - 1)
    dense = (most + 1) * (between + 1)
    return Work(
        losses=dense * ((cycles + 4) * at.samples + at.validation),
        gradients=float((curve_steps + cycles * steps * (pivots + most) / 2) * batch_size),
        vectors=BAND * (most + 2),  # with both ends
        rows=float(PIVOT * cycles * steps * (pivots + most) / 2 + POINT * (cycles + 4) * dense),
    )


@probe(
    headline=("path_loss", "barrier"),
    work=_work,
    check=(
        AtMost(
            "path loss {path_loss:.4g} ≤ max(ends, ln C = {log_classes:.4g})",
            0,
            "bound_margin",
            absolute=1e-5,
        ),
        AtMost(
            "path loss {path_loss:.4g} ≤ straight line {linear_max:.4g}",
            "path_loss",
            "linear_max",
            absolute=1e-6,
        ),
    ),
    between={"train_loss": "minimum-energy path"},
)
def auto_neb(
    landscape: Landscape,
    training: Landscape,
    validation: Landscape,
    theta: Tensor,
    theta_b: Tensor,
    rng: torch.Generator,
    report: Report,
    *,
    start: Annotated[Literal["curve", "line"], "path to relax: trained curve or line"] = "curve",
    method: Annotated[Literal["neb", "string"], "elastic band or string method"] = "neb",
    curve_steps: Annotated[int, "steps that train the curve, one gradient each", Field(ge=0)] = 400,
    pivots: Annotated[int, "pivots at the start, without the endpoints", Field(ge=1)] = 5,
    cycles: Annotated[int, "relaxations; each but the first adds pivots", Field(ge=0)] = 4,
    steps: Annotated[int, "steps of a relaxation, one gradient per pivot each", Field(ge=0)] = 40,
    lr: Annotated[float, "step size; in the last half of cycles a tenth", Field(gt=0)] = 0.01,
    batch_size: Annotated[int, "training samples per step, for all pivots", Field(ge=2)] = 128,
    between: Annotated[int, "points judged inside every segment of a path", Field(ge=1)] = 4,
    tol: Annotated[float, "gradient across the path that ends a relaxation", Field(ge=0)] = 1e-3,
) -> Result:
    """Minimum-energy path between two checkpoints by AutoNEB, and the barrier on it.

    A Bezier curve is trained (Garipov et al. 2018) and relaxed as a nudged elastic band with
    improved tangents (Henkelman & Jónsson 2000) and redistribution; pivots are added where the
    loss leaves the straight line between neighbours (Draxler et al. 2018), and in the last cycle
    the highest one climbs. Every step draws one mini-batch of the training split for all pivots.

    The path with the lowest maximum on the landscape is kept, the straight line, the curve and the
    head-collapse path (at most max(L_A, L_B, ln C)) included. `barrier` is that maximum minus
    max(L_A, L_B), its error that of per-sample differences. `perp_grad_norm` is the gradient
    across the path at the maximum, on the whole landscape: zero at a saddle.

    Momentum 0.9, threshold 0.1 and two more pivots per cycle are Draxler's, batch_size and the 61
    points of the curves Garipov's; the other defaults were tuned here, on small networks.
    """
    _check(landscape, theta, theta_b)
    curve_steps = curve_steps if start == "curve" else 0
    bar = _Progress(report, curve_steps + cycles * steps)
    dense = SampledPoints(landscape, landscape, bar.say)
    energy = mini_batches(training, batch_size, rng)
    line = refine(torch.stack([theta, theta_b]), pivots)
    collapse = _collapse(landscape, theta, theta_b)
    first, of_curve, notes = None, {}, []
    if curve_steps:
        curve = train_curve(
            energy, theta, theta_b, steps=curve_steps, lr=lr, rng=rng, report=bar.after(0)
        )
        first, of_curve, notes = _start(curve, line, between, dense)
    search = autoneb.auto_neb(
        energy,
        dense.energies,
        theta,
        theta_b,
        schedule=[Cycle(steps, lr if 2 * i < cycles else lr / 10) for i in range(cycles)],
        initial_pivots=pivots,
        between=between,
        method=method,
        tol=tol,
        start=first,
        baselines=collapse,
        report=bar.after(curve_steps),
    )
    path = _Path(Points(search.pivots, between), search.alphas, search.energies)
    linear = dense.energies(Points(line, between))
    held_out = SampledPoints(landscape, validation, bar.say)
    metrics = {
        **_heights(dense, held_out, path, linear),
        **of_curve,
        **(_bound(landscape, search) if collapse else {}),
        **_slope(landscape, path, batch_size),
        **_extent(search.pivots, line),
        **_counts(landscape, dense, search.grad_evals + curve_steps),
    }
    notes += _notes(search, bounded=bool(collapse))
    if isinstance(training.data, Batched) and batch_size < training.n_samples:
        notes.append(f"steps take the batches in their order, not {batch_size} samples at random")
    curves = _curves(path, linear, held_out)
    bar.say("done")
    return Result(metrics, curves, _arrays(path, search), search.converged, tuple(notes))


class _Path(NamedTuple):
    """The path found, by its dense points."""

    points: Points  # M of them
    alphas: Tensor  # (M,) fractions of its length
    energies: Tensor  # (M,) on the landscape

    @property
    def top(self) -> int:
        """Index of the highest point."""
        return int(self.energies.argmax())


def _check(landscape: Landscape, a: Tensor, b: Tensor) -> None:
    d = landscape.dimension
    if not a.shape == b.shape == (d,):
        raise InputError(
            f"the checkpoints have shapes {tuple(a.shape)} and {tuple(b.shape)}, the network has "
            f"{d} parameters; give two checkpoints of this network"
        )
    if torch.equal(a, b):
        raise InputError("both checkpoints are the same point; a path needs two different ones")


class _Progress:
    """Steps done out of all, and what is being measured between them."""

    def __init__(self, report: Report, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def after(self, before: int) -> Report:
        """Progress of a part that begins after so many steps."""

        def part(done: int, _: int, text: str) -> None:
            self.done = before + done
            self.say(text)

        return part

    def say(self, text: str) -> None:
        """Report what happens between two steps."""
        self.report(self.done, self.total, text)


# --- evaluation -----------------------------------------------------------------------------------


def _collapse(landscape: Landscape, a: Tensor, b: Tensor) -> list[Tensor]:
    """The path that takes the last layer to zero and back; none where that gives no bound."""
    head = find_head(landscape, a, b)
    return [] if head is None else [head_collapse_path(a, b, head)]


def _start(
    curve: TrainedCurve, line: Tensor, between: int, dense: SampledPoints
) -> tuple[Tensor | None, dict[str, Metric], list[str]]:
    """The path to relax, with the curve's barrier: the curve's, or none where it is not lower."""
    points = curve.at(torch.linspace(0, 1, len(line)))
    barrier = _above_ends(dense, Points(points, between), "curve_barrier")
    if dense.height(points, between) < dense.height(line, between):
        return points, barrier, []
    note = f"the line was relaxed: the trained curve is higher ({curve.stop_reason})"
    return None, barrier, [note]


# --- what is reported -----------------------------------------------------------------------------


def _mean(values: Tensor, unit: str = "") -> Metric:
    """Mean over the samples with its standard error."""
    n = len(values)
    errors = {"data": (values.std() / n**0.5).item()} if n > 1 else {}
    return Metric(values.mean().item(), unit, errors)


def _heights(
    dense: SampledPoints, held_out: SampledPoints, path: _Path, linear: Tensor
) -> dict[str, Metric]:
    """The highest point of the path on both splits, and that of the straight line."""
    top = dense.at(path.points[path.top])
    metrics = {
        "path_loss": _mean(top.losses, "loss"),
        **_above_ends(dense, path.points, "barrier"),
        "linear_max": Metric(linear.max().item(), "loss"),
    }
    if top.wrong is not None:
        metrics["saddle_train_error"] = _mean(top.wrong)
    return metrics | _held_out(held_out, path)


def _above_ends(dense: SampledPoints, points: Points, name: str) -> dict[str, Metric]:
    """Rise of the highest point above the higher end, paired by sample."""
    top = dense.at(points[int(dense.energies(points).argmax())])
    higher = max((dense.at(points[end]) for end in (0, -1)), key=lambda s: s.losses.mean())
    return {name: _mean(top.losses - higher.losses, "loss")}


def _held_out(held_out: SampledPoints, path: _Path) -> dict[str, Metric]:
    """The highest point on the held-out split, and how many more mistakes than at the endpoints."""
    top = held_out.at(path.points[path.top])
    metrics = {"saddle_test_loss": _mean(top.losses, "loss")}
    if top.wrong is not None:
        ends = [held_out.at(path.points[end]).wrong for end in (0, -1)]
        worse = max((wrong for wrong in ends if wrong is not None), key=lambda w: w.mean())
        metrics["saddle_test_error"] = _mean(top.wrong)
        metrics["test_error_rise"] = _mean(top.wrong - worse)
    return metrics


def _bound(landscape: Landscape, search: MinimumEnergyPath) -> dict[str, Metric]:
    log_classes = math.log(landscape.outputs(search.pivots[0], landscape.x[:1]).shape[1])
    bound = max(log_classes, search.energies[0].item(), search.energies[-1].item())
    return {
        "log_classes": Metric(log_classes, "loss"),
        "bound_margin": Metric(bound - search.max_energy, "loss"),
    }


def _slope(landscape: Landscape, path: _Path, batch_size: int) -> dict[str, Metric]:
    """The gradient at the highest point, across the path, and its cosine with the path."""
    around = range(max(path.top - 1, 0), min(path.top + 2, len(path.points)))
    near = torch.stack([path.points[i] for i in around]).double()
    if len(near) == 3:
        tau = tangents(near, path.energies[list(around)])[0]
    else:  # an endpoint
        tau = F.normalize(near[1] - near[0], dim=0)
    gradient = gradient_by_batches(landscape, path.points[path.top], batch_size)
    parallel = gradient @ tau
    return {
        "perp_grad_norm": Metric((gradient - parallel * tau).norm().item(), "loss"),
        "cosine": Metric((parallel.abs() / gradient.norm()).item()),
    }


def _extent(pivots: Tensor, line: Tensor) -> dict[str, Metric]:
    """Length of the path over that of the straight line, that length, and the number of pivots."""
    return {
        "length_ratio": Metric(length_ratio(pivots)),
        "distance": Metric(segment_lengths(line[[0, -1]]).item()),
        "n_pivots": Metric(len(pivots)),
    }


def _counts(landscape: Landscape, dense: SampledPoints, gradients: int) -> dict[str, Metric]:
    return {
        "grad_evals": Metric(gradients),
        "energy_evals": Metric(len(dense.known)),
        "n_samples": Metric(landscape.n_samples),
    }


def _curves(path: _Path, line_energies: Tensor, held_out: SampledPoints) -> dict[str, Curve]:
    """Profiles at common fractions; the held-out split is evaluated at pivots and the maximum."""
    rows = sorted({*range(0, len(path.points), path.points.between + 1), path.top})
    tested = [held_out.at(path.points[row]) for row in rows]
    alphas = path.alphas.cpu().numpy()

    def profile(x: np.ndarray, y: Tensor, unit: str = "") -> Curve:
        return Curve(GRID, np.interp(GRID, x, y.cpu().numpy()), "fraction", y_unit=unit)

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean(1)

    curves = {
        "train_loss": profile(alphas, path.energies, "loss"),
        "linear_loss": profile(np.linspace(0, 1, len(line_energies)), line_energies, "loss"),
        "test_loss": profile(alphas[rows], mean([s.losses for s in tested]), "loss"),
    }
    wrong = [s.wrong for s in tested if s.wrong is not None]
    if wrong:
        curves["test_error"] = profile(alphas[rows], mean(wrong))
    return curves


def _arrays(path: _Path, search: MinimumEnergyPath) -> dict[str, np.ndarray]:
    nodes = path.points.pivots.float().cpu().numpy()
    return {
        **{f"node_{i:02}": node for i, node in enumerate(nodes)},
        "alphas": path.alphas.cpu().numpy(),
        "energies": path.energies.cpu().numpy(),
        "cycle_max": np.array([cycle.max_energy for cycle in search.cycles]),
    }


def _notes(search: MinimumEnergyPath, *, bounded: bool) -> list[str]:
    notes = [f"the search ended in {search.stop_reason}"]
    better = "the search found nothing lower with its budget; raise curve_steps, cycles or steps"
    if search.origin.startswith("baseline"):
        notes.append(f"the path is the head-collapse baseline, of height ln C: {better}")
    elif search.origin == "straight line":
        notes.append(f"the path is the straight line: {better}")
    elif search.origin == "start":
        notes.append("the path is the trained curve: no relaxed band is lower")
    if not bounded:
        notes.append(
            "no head-collapse baseline and no ln C bound: they need cross-entropy and logits that "
            "a last linear layer gives, and data as tensors"
        )
    return notes
