"""Planes in the space of the weights: two directions from a point, and where other points lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsa.runtime.errors import InputError

FLAT = 1e-6  # share of a plane's length below which its width is rounding


@dataclass(frozen=True)
class Plane:
    """θ(x, y) = θ₀ + x u + y v."""

    origin: Tensor  # (d,) θ₀
    directions: Tensor  # (d, 2) columns u and v, linearly independent

    def at(self, x: float, y: float) -> Tensor:
        """θ(x, y) `(d,)`; bitwise θ₀ at (0, 0)."""
        u, v = self.directions.unbind(1)
        return self.origin if x == 0 and y == 0 else self.origin + x * u + y * v

    def coordinates(self, theta: Tensor) -> tuple[float, float, float]:
        """Coordinates x and y of the plane's point nearest to θ `(d,)`, and its distance from θ."""
        U, offset = self.directions.double(), (theta - self.origin).double()
        xy = torch.linalg.solve(U.T @ U, U.T @ offset)
        return xy[0].item(), xy[1].item(), torch.linalg.vector_norm(offset - U @ xy).item()


def filter_normalised(
    weights: Mapping[str, Tensor], draw: Tensor, against: Tensor | None = None
) -> Tensor:
    """A direction `(d,)` whose every filter has the norm of the weights' filter (Li et al. 2018).

    A filter is a slice along the first axis of a parameter with two axes or more: the weights into
    one channel or neuron. Parameters with one axis, biases and those of normalisation, get 0, as in
    the authors' code. So a layer scaled by a > 0 has its part of the direction scaled by a.

    Args:
        weights: The parameters by name, in the order of θ.
        draw: `(d,)` any direction, usually standard normal.
        against: `(d,)` a direction to which each filter of the result is made orthogonal, which
            scaling keeps. A filter of a single weight cannot be and is left as it is.
    """
    sizes = [w.numel() for w in weights.values()]
    others = draw.split(sizes) if against is None else against.split(sizes)
    parts = []
    for w, part, other in zip(weights.values(), draw.split(sizes), others, strict=True):
        if w.ndim < 2:
            parts.append(torch.zeros_like(part))
            continue
        rows = part.reshape(len(w), -1)
        if against is not None and rows.shape[1] > 1:
            rows = _without(rows, other.reshape(rows.shape))
        scale = w.reshape(len(w), -1).norm(dim=1) / _positive(rows.norm(dim=1))
        parts.append((rows * scale.unsqueeze(1)).reshape(-1))
    return torch.cat(parts)


def _without(rows: Tensor, others: Tensor) -> Tensor:
    """Each row minus its projection onto the other rows."""
    shares = (rows * others).sum(1) / _positive(others.square().sum(1))
    return rows - shares.unsqueeze(1) * others


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def through(a: Tensor, b: Tensor, c: Tensor) -> Plane:
    """The plane through three points, its coordinates in the unit of θ.

    Args:
        a: The origin `(d,)`.
        b: `(d,)`, on the positive x axis.
        c: `(d,)`, at y > 0.

    Raises:
        InputError: The three points lie on a line.
    """
    u, rest = (b - a).double(), (c - a).double()
    length = torch.linalg.vector_norm(u)
    unit = u / _positive(length)
    v = rest - unit * (unit @ rest)
    width = torch.linalg.vector_norm(v)
    if not width > FLAT * max(length, torch.linalg.vector_norm(rest)) or not length > 0:
        raise InputError(
            "the three checkpoints lie on a line, or two of them are the same, so no plane is "
            "theirs alone; choose others"
        )
    return Plane(a, torch.stack([unit, v / width], 1).to(a))


def principal(points: Sequence[Tensor]) -> tuple[Plane, Tensor]:
    """The plane from the last point along the first two principal components of all of them.

    Args:
        points: n vectors `(d,)`, as the checkpoints of a training in their order.

    Returns:
        The plane, with unit directions on whose positive sides the first point lies; and the share
        of the points' variance of every component, `(n − 1,)`.

    Raises:
        InputError: Fewer than three points, or all on a line.
    """
    n = len(points)
    offsets = torch.stack([p.double() - points[-1].double() for p in points])
    centred = offsets - offsets.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # n × n: n is far below d
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if n < 3 or not values[1] > FLAT**2 * values[0]:
        raise InputError(
            f"{n} checkpoints of the training lie on a line or in a point, and a plane needs three "
            "that do not; set train.checkpoint_every lower and train again"
        )
    directions = centred.T @ vectors[:, :2]
    directions = directions / directions.norm(dim=0)
    signs = torch.where(offsets[0] @ directions < 0, -1.0, 1.0).double()
    plane = Plane(points[-1], (directions * signs).to(points[-1]))
    return plane, values[: n - 1] / values.sum()


def random_walk_shares(n: int) -> Tensor:
    """Shares of the variance, `(n − 1,)`, of a random walk of n points in very many dimensions.

    They are what `principal` would return. Steps of such a walk are orthogonal and of equal length,
    so that the k-th variance is 1/(4 sin²(πk/2n)), the inverse of an eigenvalue of a path graph's
    Laplacian (Antognini & Sohl-Dickstein 2018, arXiv 1806.08805).
    """
    k = torch.arange(1, n, dtype=torch.float64)
    values = 1 / torch.sin(math.pi * k / (2 * n)).square()
    return values / values.sum()


def window(points: Tensor, n: int, margin: float, lines: Tensor) -> tuple[Tensor, Tensor]:
    """A square grid around points in a plane: evenly spaced lines, and lines through given points.

    Args:
        points: Their coordinates `(k, 2)`.
        n: Lines per axis, evenly spaced.
        margin: Side of the square over the larger span of the points.
        lines: Coordinates `(l, 2)` through which further lines go.

    Returns:
        The x of the grid's columns and the y of its rows, ascending, in float64.
    """
    low, high = points.min(0).values, points.max(0).values
    reach = margin * float((high - low).max()) / 2
    even = reach * torch.linspace(-1, 1, n, dtype=torch.float64)
    xs, ys = (
        torch.unique(torch.cat([middle + even, crossing.double()]))
        for middle, crossing in zip((low + high) / 2, lines.T, strict=True)
    )
    return xs, ys
