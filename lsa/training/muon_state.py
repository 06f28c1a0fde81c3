"""Muon's preconditioner, on the smaller side of each matrix.

Muon steps by the orthogonalised momentum. Its Newton–Schulz iteration takes a momentum M = USVᵀ
of shape (m, n) to U f(S) Vᵀ = QM with Q = U (f(S)/S) Uᵀ, a positive definite polynomial in MMᵀ, so
the step is −η s Q M with s = √max(1, m/n): that of a preconditioner P = (sQ)⁻¹ which acts on the
smaller side of the matrix, roughly (MMᵀ)^½, as Shampoo's without accumulation does (Bernstein &
Newhouse 2024, "Old optimizer, new norm", arXiv 2409.20325). On the smaller side, since there alone
a perturbation outside the span of M is answered as the derivative of UVᵀ answers it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsa.runtime.errors import InputError
from lsa.training.muon import NEWTON_SCHULZ, Muon
from lsa.training.preconditioners import Preconditioner, Rule, edge, preconditioner
from lsa.training.torch_rules import adamw


@preconditioner(Muon)
def muon(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule | str:
    """Muon's rule for hidden weights, AdamW's for the second group."""
    if "betas" in group:
        return adamw(parameter, group, state)
    P = None
    if state:
        M = state["momentum_buffer"].double().flatten(1)
        scale = math.sqrt(max(1.0, M.shape[0] / M.shape[1]))
        P = orthogonalising(M, [NEWTON_SCHULZ] * group["ns_steps"], scale)
    return averaged_momentum(P, group)


@preconditioner("torch:Muon")  # from 2.9 on
def torch_muon(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """The rule of `torch.optim.Muon`, all of whose parameters are matrices `(m, n)`."""
    P = None
    if state:
        rows, columns = parameter.shape
        scale = {
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
            "spectral_unclamped": math.sqrt(rows / columns),
        }.get(group["adjust_lr_fn"], math.sqrt(max(1.0, rows / columns)))
        M = state["momentum_buffer"].double()
        P = orthogonalising(M, [group["ns_coefficients"]] * group["ns_steps"], scale)
    return averaged_momentum(P, group)


def averaged_momentum(
    P: Preconditioner | None, group: Mapping[str, Any], penalty: float = 0.0
) -> Rule:
    """The rule of an exponential average, with Nesterov's look ahead where the group has it."""
    rate, beta = float(group["lr"]), float(group["momentum"])
    decay = rate * group["weight_decay"]
    ahead = 1 + 2 * beta if group["nesterov"] else 1
    formula = f"{'(2−ηλ)' if decay else '2'}(1+β)/((1−β){'(1+2β)' if ahead > 1 else ''}η)"
    return Rule(P, edge(rate, (1 - beta) * ahead / (1 + beta), decay), formula, penalty)


def orthogonalising(
    M: Tensor, coefficients: Sequence[tuple[float, float, float]], scale: float
) -> Preconditioner:
    """P of the step s Q M, from the momentum M of shape (m, n) in float64.

    Args:
        M: The momentum.
        coefficients: a, b and c of each Newton–Schulz iteration X ← aX + (bA + cA²)X, A = XXᵀ.
        scale: s.

    Raises:
        InputError: The momentum is zero or not finite.
    """
    norm = M.norm()
    if not (torch.isfinite(norm) and norm > 0):
        raise InputError(
            "the momentum of Muon is zero or not finite, so it preconditions nothing; train again "
            "with a lower learning rate"
        )
    wide = M.shape[0] <= M.shape[1]  # P acts on the left
    squares, U = torch.linalg.eigh(M @ M.T if wide else M.T @ M)
    x = squares.clamp_min(0).sqrt() / norm
    gain = torch.full_like(x, scale / norm.item())
    for a, b, c in coefficients:  # gain is s f(S)/S, and positive: a + bx² + cx⁴ has no real zero
        factor = a + b * x**2 + c * x**4
        x, gain = factor * x, factor * gain
    root, diagonal = (U * gain.sqrt()) @ U.T, U.square() @ (1 / gain)

    def inverse_root(v: Tensor) -> Tensor:
        V = v.view(M.shape)
        return (root @ V if wide else V @ root).reshape(-1)

    diagonal = (diagonal[:, None] if wide else diagonal).expand_as(M)
    return Preconditioner(diagonal.flatten(), inverse_root)
