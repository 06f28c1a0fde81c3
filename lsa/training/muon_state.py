"""What Muon's steps can bear: a preconditioner on matrices, beside AdamW's diagonal for the rest.

Muon steps by the orthogonalised momentum. Its Newton–Schulz iteration takes a momentum M = USVᵀ
of shape (m, n) to U f(S) Vᵀ = QM with Q = U (f(S)/S) Uᵀ, a positive definite polynomial in MMᵀ, so
the step is −η s Q M with s = √max(1, m/n): that of a preconditioner P = (sQ)⁻¹ which acts on the
smaller side of the matrix, roughly (MMᵀ)^½, as Shampoo's without accumulation does (Bernstein &
Newhouse 2024, "Old optimizer, new norm", arXiv 2409.20325). On the smaller side, since there alone
a perturbation outside the span of M is answered as the derivative of UVᵀ answers it.

One network has two rules then, each with a threshold of its own: T for Muon, Tₐ for AdamW. In P
AdamW's diagonal stands times Tₐ/T, which leaves one common threshold T. That is exact: on a convex
quadratic with P at rest, the iteration of both together first has a growing mode, one that changes
its sign in every step, where an eigenvalue of that P⁻¹H passes T. For averages with factor β,
T = (2−ηλ)(1+β)/((1−β)η), and with Nesterov's look ahead (2−ηλ)(1+β)/((1−β)(1+2β)η).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsa.runtime.errors import InputError
from lsa.training import optimizers, stability
from lsa.training.stability import OptimizerState, Preconditioner


@dataclass(frozen=True)
class MuonState:
    """Muon after its last step, over a network's trainable parameters."""

    stored: Mapping[str, Any]  # what its `state_dict` returned
    parameters: Sequence[nn.Parameter]  # of the network, in its order; their values are not read
    momenta: Mapping[int, Tensor]  # index of a hidden weight → momentum, of the weight's shape
    rest: OptimizerState  # AdamW's, over what is trainable and not hidden
    batch_size: int  # samples per step
    name: str = "Muon"
    penalty: float = 0.0  # weight decay is decoupled

    @property
    def options(self) -> Mapping[str, Any]:
        """Of the hidden weights, `lr` as of the last step."""
        return self.stored["param_groups"][0]

    @property
    def steps(self) -> int:
        """Taken."""
        return self.rest.steps

    @property
    def learning_rate(self) -> float:
        """η of the hidden weights in the last step."""
        return float(self.options["lr"])

    @property
    def threshold(self) -> tuple[float, str] | None:
        """Largest eigenvalue of P⁻¹H that does not diverge while P stands still, and its formula.

        None where one of the two rules has none, as with a rate of zero.
        """
        eta, beta = self.learning_rate, float(self.options["momentum"])
        decay = eta * self.options["weight_decay"]
        if not (eta > 0 and decay < 2 and self.rest.threshold):
            return None
        ahead = 1 + 2 * beta if self.options["nesterov"] else 1
        text = f"{'(2−ηλ)' if decay else '2'}(1+β)/((1−β){'(1+2β)' if ahead > 1 else ''}η)"
        return (2 - decay) * (1 + beta) / ((1 - beta) * ahead * eta), text

    def preconditioner(self, theta: Tensor) -> Preconditioner | None:
        """P as of the last step, from the momentum that it left; None before the first step.

        Raises:
            InputError: No common threshold for both rules, or a momentum or second moment that
                preconditions nothing.
        """
        if not self.steps:
            return None
        if self.threshold is None or self.rest.threshold is None:
            raise InputError(
                f"Muon stood still in a part of the network (learning rates {self.learning_rate:g} "
                f"and {self.rest.learning_rate:g}), so no one P tells what it feels; choose a "
                "checkpoint where both are positive"
            )
        P = torch.ones(len(theta), dtype=torch.float64, device=theta.device)
        hidden = torch.zeros(len(theta), dtype=torch.bool, device=theta.device)
        roots: list[tuple[slice, torch.Size, Tensor]] = []
        end = 0
        for i, p in enumerate(self.parameters):
            if not p.requires_grad:
                continue
            part = slice(end, end := end + p.numel())
            if i in self.momenta:
                M = self.momenta[i].to(theta.device, torch.float64).flatten(1)
                root, diagonal = _factors(M, self.options["ns_steps"])
                P[part] = (diagonal[:, None] if _wide(M.shape) else diagonal).expand_as(M).flatten()
                roots.append((part, M.shape, root))
                hidden[part] = True
        adamw = self.rest.preconditioner(theta[~hidden])
        assert adamw is not None  # it has stepped
        P[~hidden] = adamw.diagonal * (self.rest.threshold[0] / self.threshold[0])
        scale = torch.where(hidden, 1.0, P.rsqrt())

        def inverse_root(v: Tensor) -> Tensor:
            w = scale * v
            for part, shape, root in roots:
                V = w[part].view(shape)
                w[part] = (root @ V if _wide(shape) else V @ root).flatten()
            return w

        return Preconditioner(P, inverse_root)

    def update(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """What Muon adds to θ in its next step with a gradient, `(d,)`."""
        moved = [nn.Parameter(torch.zeros(p.shape, dtype=torch.float64)) for p in self.parameters]
        optimizer = optimizers.build("Muon", moved)
        optimizer.load_state_dict(copy.deepcopy(dict(self.stored)))  # torch shares the tensors
        places = [p for p, own in zip(moved, self.parameters, strict=True) if own.requires_grad]
        sizes = [p.numel() for p in places]
        for p, at, slope in zip(places, theta.split(sizes), gradient.split(sizes), strict=True):
            p.data.copy_(at.view_as(p))
            p.grad = slope.view_as(p).to(p)
        optimizer.step()
        after = torch.cat([p.detach().reshape(-1) for p in places]).to(theta.device)
        return (after - theta.double()).to(theta.dtype)


def _wide(shape: torch.Size) -> bool:
    """Whether the smaller side, on which P acts, is the left one."""
    return shape[0] <= shape[1]


def _factors(M: Tensor, ns_steps: int) -> tuple[Tensor, Tensor]:
    """P^(−½) on the smaller side of a momentum, and the diagonal of P there.

    Raises:
        InputError: The momentum is zero or not finite.
    """
    norm = M.norm()
    if not (torch.isfinite(norm) and norm > 0):
        raise InputError(
            "the momentum of Muon is zero or not finite, so it preconditions nothing; train again "
            "with a lower learning rate"
        )
    squares, U = torch.linalg.eigh(M @ M.T if _wide(M.shape) else M.T @ M)
    x = squares.clamp_min(0).sqrt() / norm
    a, b, c = optimizers.NEWTON_SCHULZ
    gain = torch.full_like(x, math.sqrt(max(1.0, M.shape[0] / M.shape[1])) / norm.item())
    for _ in range(ns_steps):  # gain is s f(S)/S, and positive: a + bx² + cx⁴ has no real zero
        factor = a + b * x**2 + c * x**4
        x, gain = factor * x, factor * gain
    return (U * gain.sqrt()) @ U.T, U.square() @ (1 / gain)


def read(
    stored: Mapping[str, Any], parameters: Sequence[nn.Parameter], batch_size: int
) -> MuonState:
    """The state of Muon from its `state_dict`.

    Args:
        stored: What `state_dict` returned.
        parameters: All of the network, in its order.
        batch_size: Samples per step.

    Raises:
        InputError: A state that is not there, not whole or of another network.
    """
    chosen = {id(p) for p in optimizers.hidden_weights(parameters)}
    hidden = [i for i, p in enumerate(parameters) if id(p) in chosen]
    others = [p for p in parameters if id(p) not in chosen]
    groups = stored.get("param_groups", [])
    if [len(group["params"]) for group in groups] != [len(hidden), len(others)]:
        raise InputError(
            f"the checkpoint keeps no state of Muon over the {len(parameters)} parameters of its "
            "network; train again with lsa train, which keeps it"
        )
    own, adamw = groups
    state = stored["state"]
    rest = stability.read("AdamW", {"state": state, "param_groups": [adamw]}, others, batch_size)
    momenta = {
        i: state[index]["momentum_buffer"]
        for i, index in zip(hidden, own["params"], strict=True)
        if rest.steps and parameters[i].requires_grad
    }
    return MuonState(stored, parameters, momenta, rest, batch_size)
