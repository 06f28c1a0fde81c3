"""The gradient: its length, its angle to the optimizer's step, and where in the network it sits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lsa.landscape import Landscape
from lsa.landscape.blocks import blocks
from lsa.maths.spaces import LOCAL
from lsa.probe import Curve, Metric, Result, Same, Sizes, Work, probe, standard_error
from lsa.runtime.errors import InputError
from lsa.training import stability
from lsa.training.stability import OptimizerState

PIECE = 1 << 22  # numbers that are taken to float64 at once


def _work(at: Sizes, **_: Any) -> Work:
    """The gradient, and that of each sample."""
    # With the optimizer's state and step in float64.
    return Work(gradients=3.0 * at.samples, vectors=16, rows=15)


@probe(
    headline=("gradient_norm", "update_angle"),
    work=_work,
    compare=("gradient_norm", "update_angle"),
    check=(Same("|∇L|", "gradient_norm", "lanczos/gradient_norm", within=1e-3),),
    during=("gradient_norm", "update_angle"),
    caption="Share of |∇L|² of each layer, from the first to the last: see which layers plain "
    "gradient descent would move. The optimizer's own steps may be elsewhere, and a large layer "
    "has a large share for its size alone.",
)
def gradient(
    landscape: Landscape,
    theta: Tensor,
    optimizer: OptimizerState | Optimizer | None = None,
) -> Result:
    """Length of ∇L, its angle to the optimizer's next step, and the share of each layer.

    update_angle is the angle between −∇L and the step u that the optimizer makes next from its
    state and the gradient over the measured samples, decoupled decay included: 0° for SGD without
    momentum, 90° where the step leaves the loss as it is to first order. It is twice the arctangent
    of |e − v|/|e + v| for the unit vectors e and v, which small angles need (Kahan 2006, "How
    futile are mindless assessments of roundoff in floating-point computation?"). An angle that is
    within the rounding of u is 0 or 180°, without an error. The optimizer is a live one of torch
    over the landscape's model, or a checkpoint's; where there is none, or it makes no step from a
    gradient (SAM), the angle is left out.

    A layer is a module with parameters of its own; the shares |(∇L)_b|²/|∇L|² add up to 1.

    Standard errors over the data are first-order, from the per-sample gradients; of the angle, with
    u held still. The length on N samples is biased up: E|∇L_N|² = |∇L|² + tr C/N, with C the
    covariance of the per-sample gradients.
    """
    g = landscape.gradient(theta)
    layers = blocks(landscape.unflatten(theta), 0)
    pieces = _pieces(landscape, theta, layers)
    squares = g.new_zeros(len(layers), dtype=torch.float64)
    for layer, piece in pieces:
        squares[layer] += _square(g[piece])
    norm = squares.sum().sqrt().item()
    n_samples = Metric(landscape.n_samples)
    if norm == 0:
        note = "the gradient is 0, so there are no angle and no shares"
        return Result({"gradient_norm": Metric(0.0, "loss"), "n_samples": n_samples}, notes=(note,))
    u, notes = _step(landscape, theta, g, optimizer)
    turn = None if u is None else Turn(g, u, norm, pieces, _rounding(theta, u))

    parts, across = _slopes(landscape, theta, g, pieces, turn)
    total = parts.sum(1)
    metrics = {"gradient_norm": Metric(norm, "loss", standard_error(total / norm))}
    if turn is not None:
        error = {} if turn.straight else standard_error(across * (180 / math.pi / norm))
        metrics["update_angle"] = Metric(math.degrees(turn.angle), "°", error)
    metrics["n_samples"] = n_samples

    share = squares / norm**2
    # A sample moves |g_b|² by 2 g_b·(gᵢ − g)_b, and the ratio by that less its own share of |g|²'s.
    influences = 2 * (parts - share * total[:, None]) / norm**2
    curve = Curve(
        np.arange(1.0, len(layers) + 1),
        share.cpu().numpy(),
        "layer",
        _errors(influences),
    )
    sizes = np.zeros(len(layers), dtype=np.int64)
    for layer, piece in pieces:
        sizes[layer] += piece.stop - piece.start
    arrays = {"layers.names": np.array(list(layers)), "layers.sizes": sizes}
    notes.append("layers from 1 on: " + ", ".join(layers))
    return Result(metrics, {"share_of_layer": curve}, arrays, notes=tuple(notes))


def _pieces(
    landscape: Landscape, theta: Tensor, layers: Mapping[str, list[str]]
) -> list[tuple[int, slice]]:
    """Index of a layer and a piece of θ `(d,)` that belongs to it, one behind the other.

    Sums run in float64 over one piece at a time: a vector like θ in float64 may not fit.
    """
    index = {name: i for i, members in enumerate(layers.values()) for name in members}
    pieces, start = [], 0
    for name, p in landscape.unflatten(theta).items():
        end = start + p.numel()
        cuts = [*range(start, end, PIECE), end]
        pieces += [(index[name], slice(a, b)) for a, b in pairwise(cuts)]
        start = end
    return pieces


def _step(
    landscape: Landscape,
    theta: Tensor,
    g: Tensor,
    optimizer: OptimizerState | Optimizer | None,
) -> tuple[Tensor | None, list[str]]:
    """The optimizer's next step `(d,)`, or None and a note why there is none."""
    if optimizer is None:
        return None, ["no update_angle: no optimizer was given, or the checkpoint has none"]
    if not isinstance(optimizer, OptimizerState):
        optimizer = stability.read(optimizer, landscape.own_parameters)
    try:
        u = optimizer.update(theta, g.to(theta.dtype))
    except InputError as error:
        return None, [f"no update_angle: {error}"]
    return (u, []) if u.any() else (None, ["no update_angle: the next step is zero"])


def _rounding(theta: Tensor, u: Tensor) -> float:
    """Relative error of a step: u is a difference of parameters in float64, then of θ's type."""
    ratio = (LOCAL.length(theta) / LOCAL.length(u)).item()
    of_difference = torch.finfo(torch.float64).eps * ratio
    return max(torch.finfo(theta.dtype).eps, of_difference)


class Turn:
    """The angle between −g and u in radians, and the direction in which u turns away from −g.

    Args:
        g: Gradient `(d,)`.
        u: Step `(d,)`.
        norm: |g|.
        pieces: Of `_pieces`.
        rounding: Relative error of the step, below which an angle is 0 or π.
    """

    def __init__(
        self, g: Tensor, u: Tensor, norm: float, pieces: list[tuple[int, slice]], rounding: float
    ) -> None:
        self._g, self._u, self._norm = g, u, norm
        self._length = math.sqrt(sum(_square(u[piece]) for _, piece in pieces))
        apart = along = self._cosine = 0.0
        for _, piece in pieces:
            e, v = self._units(piece)
            apart, along = apart + _square(e - v), along + _square(e + v)
            self._cosine += (e @ v).item()
        self.angle = 2 * math.atan2(math.sqrt(apart), math.sqrt(along))
        self.straight = math.sin(self.angle) <= 4 * rounding  # then there is no direction
        if self.straight:
            self.angle = 0.0 if self.angle < 1 else math.pi

    def _units(self, piece: slice) -> tuple[Tensor, Tensor]:
        """A piece of the unit vectors along −g and u."""
        return self._g[piece].double() / -self._norm, self._u[piece].double() / self._length

    def normal(self, piece: slice) -> Tensor:
        """A piece of the unit vector perpendicular to g, towards u."""
        e, v = self._units(piece)
        return v.sub_(e, alpha=self._cosine) / math.sin(self.angle)


def _square(piece: Tensor) -> float:
    return piece.double().square().sum().item()


def _slopes(
    landscape: Landscape,
    theta: Tensor,
    g: Tensor,
    pieces: list[tuple[int, slice]],
    turn: Turn | None,
) -> tuple[Tensor, Tensor]:
    """Influences of each sample on g_b·g_b of the layers `(N, layers)`, and on g·normal `(N,)`."""
    n, parts, across = 1 + max(layer for layer, _ in pieces), [], []
    for rows in landscape.sample_gradients(theta):
        part = rows.new_zeros(len(rows), n, dtype=torch.float64)
        turned = part.new_zeros(len(rows))
        for layer, piece in pieces:
            own = rows[:, piece].double()
            part[:, layer] += own @ g[piece].double()
            if turn and not turn.straight:
                turned += own @ turn.normal(piece)
        parts.append(part)
        across.append(turned)
    return landscape.influences(torch.cat(parts)), landscape.influences(torch.cat(across))


def _errors(influences: Tensor) -> np.ndarray | None:
    n = len(influences)
    return (influences.std(0) / n**0.5).cpu().numpy() if n > 1 else None
