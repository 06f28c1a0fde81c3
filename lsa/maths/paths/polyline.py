"""Geometry of paths through parameter space: polylines, barriers, and two exact constructions.

A path is a polyline through pivots `(P, d)`: flat parameter vectors, the first and last of which
are its endpoints. Lengths are Euclidean in θ and accumulated in float64. Nothing here evaluates an
energy; the searches that do are in `lsa.maths.paths.neb` and `curves`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lsa.runtime.errors import InputError

# --- arc length ---------------------------------------------------------------------------------


def segment_lengths(pivots: Tensor) -> Tensor:
    """Lengths |θᵢ₊₁ − θᵢ| of the segments of a polyline `(P, d)`: float64, shape `(P−1,)`."""
    return torch.linalg.vector_norm(pivots[1:] - pivots[:-1], dim=1, dtype=torch.float64)


def arc_lengths(pivots: Tensor) -> Tensor:
    """Arc length from the first pivot to every pivot of `(P, d)`: float64, shape `(P,)`."""
    return F.pad(segment_lengths(pivots).cumsum(0), (1, 0))


def length_ratio(pivots: Tensor) -> float:
    """Length of a path `(P, d)` over its chord |θ_P − θ_1|: 1 if straight; nan if the ends meet."""
    chord = segment_lengths(pivots[[0, -1]])[0]
    return (arc_lengths(pivots)[-1] / chord).item()


def with_exact_ends(points: Tensor, t: Tensor, path: Tensor) -> Tensor:
    """Points of a path, with its endpoints put in bitwise where t is 0 or 1.

    Args:
        points: `(T, d)`.
        t: Their parameters `(T,)`.
        path: `(P, d)`, whose first and last row are the endpoints.
    """
    points = torch.where((t == 0)[:, None], path[0], points)
    return torch.where((t == 1)[:, None], path[-1], points)


def _at_arc_length(pivots: Tensor, positions: Tensor) -> Tensor:
    """Points of the polyline at arc lengths `(T,)` from its start."""
    s = arc_lengths(pivots)
    segment = (torch.searchsorted(s, positions, right=True) - 1).clamp(0, len(pivots) - 2)
    length = s[segment + 1] - s[segment]
    fraction = torch.where(length > 0, (positions - s[segment]) / length, 0.0)
    return torch.lerp(pivots[segment], pivots[segment + 1], fraction[:, None].to(pivots.dtype))


def redistribute(pivots: Tensor, spacing: Tensor | None = None) -> Tensor:
    """Slide the pivots along their own polyline to prescribed relative distances.

    New pivot i sits at arc length S·(c₁ + … + cᵢ₋₁)/∑c of the old polyline, S its length (E, Ren &
    Vanden-Eijnden 2007; Draxler et al. 2018, the limit of infinitely stiff springs).

    Args:
        pivots: `(P, d)`.
        spacing: Relative distances c `(P−1,)` between neighbours; equal if not given.

    Returns:
        `(P, d)`, first and last row bitwise those given.

    Raises:
        InputError: Fewer than two pivots, or a spacing that is not P−1 positive numbers.
    """
    n = len(pivots) - 1
    if n < 1:
        raise InputError(f"{n + 1} pivots make no path; give at least 2")
    c = torch.ones(n) if spacing is None else spacing
    if c.shape != (n,) or not (c > 0).all():
        raise InputError(f"spacing of shape {tuple(c.shape)} must hold {n} positive distances")
    share = c.to(pivots.device, torch.float64).cumsum(0)
    positions = share[:-1] / share[-1] * arc_lengths(pivots)[-1]
    return torch.cat([pivots[:1], _at_arc_length(pivots, positions), pivots[-1:]])


def refine(pivots: Tensor, between: int) -> Tensor:
    """The pivots `(P, d)` and `between` equally spaced points inside every segment, in order.

    Returns:
        `((P−1)(between+1)+1, d)`; every (between+1)-th row is a pivot, bitwise.
    """
    return torch.stack(list(Points(pivots, between)))


@dataclass(frozen=True)
class Points:
    """The points that `refine` gives, each made when it is asked for: all may not fit in memory."""

    pivots: Tensor  # (P, d)
    between: int

    def __len__(self) -> int:
        return (len(self.pivots) - 1) * (self.between + 1) + 1

    def __getitem__(self, i: int) -> Tensor:
        """Point number i `(d,)`; negative ones count from the end."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"point {i} of {len(self)}")
        segment, j = divmod(i % len(self), self.between + 1)
        if not j:
            return self.pivots[segment]
        share = torch.tensor(j / (self.between + 1)).to(self.pivots)
        return torch.lerp(self.pivots[segment], self.pivots[segment + 1], share)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


# --- tangents -------------------------------------------------------------------------------------


def tangents(pivots: Tensor, energies: Tensor) -> Tensor:
    """Unit tangents τᵢ at the interior pivots, always pointing at the higher neighbour.

    τ⁺ = θᵢ₊₁ − θᵢ where the energy rises through pivot i, τ⁻ = θᵢ − θᵢ₋₁ where it falls; at an
    extremum ΔV_max τ⁺ + ΔV_min τ⁻ if Vᵢ₊₁ > Vᵢ₋₁, else ΔV_min τ⁺ + ΔV_max τ⁻, with ΔV the larger
    and the smaller of |Vᵢ₊₁ − Vᵢ| and |Vᵢ₋₁ − Vᵢ| (Henkelman & Jónsson 2000, eqs. 8-11). Where the
    energy is exactly flat, which the paper leaves open, τ⁺ + τ⁻.

    Args:
        pivots: `(P, d)`.
        energies: `(P,)`, comparable with each other: all on the same samples.

    Returns:
        `(P−2, d)`; a zero row where neighbours coincide.
    """
    steps = pivots[1:] - pivots[:-1]
    rise = energies[1:] - energies[:-1]
    before, after = rise[:-1], rise[1:]
    large = torch.maximum(before.abs(), after.abs())
    # A ratio in place of the two ΔV: the same direction, and no underflow on an almost flat path.
    small = torch.where(large > 0, torch.minimum(before.abs(), after.abs()) / large, 1.0)
    rising, falling = (before > 0) & (after > 0), (before < 0) & (after < 0)
    uphill = energies[2:] > energies[:-2]
    forward = torch.where(uphill, 1.0, small).masked_fill(rising, 1.0).masked_fill(falling, 0.0)
    backward = torch.where(uphill, small, 1.0).masked_fill(rising, 0.0).masked_fill(falling, 1.0)
    tau = forward.to(pivots)[:, None] * steps[1:] + backward.to(pivots)[:, None] * steps[:-1]
    return F.normalize(tau, dim=1)


# --- barriers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Barriers:
    """Heights of paths above their endpoints, in the three ways the literature measures them."""

    mean: Tensor  # sup E − (E_A + E_B)/2, Frankle et al. 2020; not zero if E_A ≠ E_B
    linear: Tensor  # sup E(α) − ((1−α)E_A + αE_B), Entezari et al. 2022
    max: Tensor  # sup E − max(E_A, E_B)


def barriers(energies: Tensor, alphas: Tensor) -> Barriers:
    """The three barriers of energy profiles, each a supremum over the grid points in [0, 1].

    Args:
        energies: Energy (loss or error) at each α, shape `(…, M)`. A nan inside stays a nan.
        alphas: Positions `(M,)`, 0 at endpoint A and 1 at B, both present to within 1e-6; points
            outside [0, 1] (extrapolation) are not part of the path and are left out.

    Returns:
        Heights `(…)` in float64.

    Raises:
        InputError: Shapes differ, or the grid lacks an endpoint.
    """
    if alphas.ndim != 1 or energies.shape[-1:] != alphas.shape:
        raise InputError(
            f"energies {tuple(energies.shape)} must end in the length of alphas "
            f"{tuple(alphas.shape)}, a vector"
        )
    E, alpha = energies.double(), alphas.to(energies.device, torch.float64)
    ends = []
    for end in (0.0, 1.0):
        distance = (alpha - end).abs()
        if not (distance <= 1e-6).any():
            raise InputError(f"no grid point at alpha={end:g}; a barrier needs both endpoints")
        ends.append(E[..., distance.argmin()])
    E_a, E_b = ends
    inside = (alpha >= -1e-6) & (alpha <= 1 + 1e-6)
    E, alpha = E[..., inside], alpha[inside].clamp(0, 1)
    chord = (1 - alpha) * E_a[..., None] + alpha * E_b[..., None]
    top = E.amax(-1)
    return Barriers(
        mean=top - (E_a + E_b) / 2,
        linear=(E - chord).amax(-1).clamp(min=0),
        max=top - torch.maximum(E_a, E_b),
    )


# --- an exact baseline ---------------------------------------------------------------------


def head_collapse_path(a: Tensor, b: Tensor, head: Tensor, between: int = 0) -> Tensor:
    """A path on which no classifier with a linear head exceeds max(L_A, L_B, ln C).

    Scale A's head to zero, move the trunk from A to B, scale B's head up from zero. With the head
    at zero all C logits are equal and the cross-entropy is exactly ln C; along a head scaling the
    logits are linear in the scale, so the loss is convex and below the larger of its ends. No
    minimum-energy path may therefore be higher: a baseline that costs no gradient.

    Args:
        a: Parameters of A, `(d,)`.
        b: Parameters of B, `(d,)`.
        head: True at the coordinates of the last linear layer, weight *and* bias, bool `(d,)`.
        between: Points added inside each of the three straight legs; the legs need none.

    Returns:
        `(3·between + 4, d)`: A, A without head, B without head, B, and the points between.

    Raises:
        InputError: Shapes differ, or the mask is not boolean or selects nothing.
    """
    if not a.shape == b.shape == head.shape or a.ndim != 1:
        raise InputError(
            f"a {tuple(a.shape)}, b {tuple(b.shape)} and head {tuple(head.shape)} must be vectors "
            "of one length d"
        )
    if head.dtype != torch.bool or not head.any():
        raise InputError("head must be a boolean mask that selects the last layer; it selects none")
    vertices = torch.stack([a, a.masked_fill(head, 0), b.masked_fill(head, 0), b])
    return refine(vertices, between)
