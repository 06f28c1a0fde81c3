"""Gauss and Gauss–Radau rules of a spectral measure, from Lanczos coefficients of one vector."""

from __future__ import annotations

import torch
from torch import Tensor

from lsa.maths.spaces import LOCAL, Space
from lsa.maths.spectra.krylov import Matvec, apply, negligible, orthogonalise, to_host


def tridiagonalise(
    matvec: Matvec, start: Tensor, steps: int, space: Space = LOCAL
) -> tuple[Tensor, Tensor]:
    """Lanczos coefficients α, β of T = tridiag(β, α, β) = Vᵀ A V, V spanning the Krylov space.

    Every vector is orthogonalised against all earlier ones: without that, in floating-point
    arithmetic, T repeats eigenvalues that have converged, and counting them fails.

    Args:
        matvec: v `(d,)` ↦ A v `(d,)`.
        start: First vector `(d,)`, of any length but zero.
        steps: Most steps; fewer are returned when the Krylov space is exhausted.
        space: Of the vectors.

    Returns:
        α `(m,)` and β `(m,)` in float64; β[m − 1] couples to the vector that would come next.
    """
    V = start.new_empty(steps, len(start))
    V[0] = start / space.length(start).to(start)
    alpha, beta = [], []
    scale = 0.0
    for j in range(steps):
        w, c = orthogonalise(apply(matvec, V[j]), V[: j + 1], space)
        pair = to_host(torch.stack([c[j], space.length(w)]))
        alpha.append(float(pair[0]))
        beta.append(float(pair[1]))
        scale = max(scale, *pair.abs().tolist())
        if negligible(beta[-1], scale, w.dtype):
            break
        if j + 1 < steps:
            V[j + 1] = w / beta[-1]
    return torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64)


def gauss_rule(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss rule of T = tridiag(β, α, β) (Golub & Welsch 1969).

    The nodes are the eigenvalues of T, the weights the squared first components of its
    eigenvectors: ∑ₖ wₖ θₖᵖ = vᵀ Aᵖ v / vᵀv for p ≤ 2m − 1.
    """
    nodes, S = torch.linalg.eigh(tridiagonal(alpha, beta[:-1]))
    return nodes, S[0].square()


def sign_masses(alpha: Tensor, beta: Tensor, rounding: float) -> tuple[float, float, float, float]:
    """Mass of a spectral measure below zero and at zero, and bounds on both: fields of `Signs`.

    The Gauss–Radau rule with a node at zero (Golub 1973, "Some modified matrix eigenvalue
    problems", SIAM Review 15) has the moments of the measure and the largest weight at zero that
    any measure with these moments can have. What its other negative nodes weigh is a lower bound of
    the mass below zero, with the node at zero an upper bound of the mass up to zero
    (Chebyshev–Markov–Stieltjes). How much of the node at zero is zero and how much the small
    eigenvalues around it no moment tells. Taken here: on either side half of what the neighbour
    weighs, as in a smooth density, and the rest is zero.

    Args:
        alpha: Diagonal `(m,)` of T, from `tridiagonalise`.
        beta: Couplings `(m,)`.
        rounding: Size relative to the largest |θ| up to which a node is zero.
    """
    nodes, S = torch.linalg.eigh(tridiagonal(alpha, beta[:-1]))
    zero = rounding * float(nodes.abs().max())
    ended = float(beta[-1]) <= zero  # then the nodes are the eigenvalues that the start contains
    if not ended and float(nodes.abs().min()) > zero:
        last = beta[-1].square() * (S[-1].square() / nodes).sum()
        nodes, S = torch.linalg.eigh(tridiagonal(torch.cat([alpha, last[None]]), beta))
    w = S[0].square()
    below, above = w[nodes < -zero], w[nodes > zero]
    low, at = float(below.sum()), float(w[nodes.abs() <= zero].sum())
    beside = [0.0 if ended else float(side.sum()) / 2 for side in (below[-1:], above[:1])]
    share = min(1.0, at / sum(beside)) if sum(beside) else 0.0
    return low + share * beside[0], max(0.0, at - share * sum(beside)), low, low + at


def tridiagonal(diagonal: Tensor, side: Tensor) -> Tensor:
    """The symmetric matrix `(m, m)` of a diagonal `(m,)` and the coefficients beside it."""
    return torch.diag(diagonal) + torch.diag(side, 1) + torch.diag(side, -1)
