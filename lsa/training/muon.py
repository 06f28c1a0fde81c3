"""Muon (Jordan et al. 2024): steps by the orthogonalised momentum of each hidden weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import Optimizer

from lsa.runtime.errors import InputError

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Muon(Optimizer):
    """Muon on the hidden weights, AdamW on everything else (Jordan et al. 2024).

    θ ← (1 − ηλ) θ − η √max(1, m/n) · NS(g + μ-momentum): the momentum of an m × n weight,
    orthogonalised by Newton–Schulz iteration. As its authors prescribe, convolutions count as
    matrices of shape (out, in · height · width), and the first weight, the last weight (the
    classifier's), biases and gains belong to AdamW. Defaults are those of the authors' README.

    Args:
        params: Of the network, in its order, from which first and last are known.
        lr: η for the hidden weights, in units of spectral norm per step.
        momentum: μ, an exponential average.
        nesterov: Look one step ahead.
        ns_steps: Newton–Schulz iterations.
        weight_decay: λ, decoupled, for all parameters.
        adamw_lr: AdamW's learning rate.
        adamw_betas: AdamW's averaging constants.

    Raises:
        InputError: The network has no hidden weight.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: NonNegativeFloat = 0.02,
        momentum: Fraction = 0.95,
        nesterov: bool = True,
        ns_steps: PositiveInt = 5,
        weight_decay: NonNegativeFloat = 0.01,
        adamw_lr: NonNegativeFloat = 3e-4,
        adamw_betas: tuple[Fraction, Fraction] = (0.9, 0.95),
    ) -> None:
        params = list(params)
        hidden = hidden_weights(params)
        chosen = {id(p) for p in hidden}
        rest = {
            "params": [p for p in params if id(p) not in chosen],
            "lr": adamw_lr,
            "betas": adamw_betas,
        }
        self.adamw = torch.optim.AdamW([rest], weight_decay=weight_decay)
        own = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(hidden, {**own, "weight_decay": weight_decay})
        # One optimizer to the outside: AdamW works on the second group and in the same state.
        self.param_groups += self.adamw.param_groups
        self._share()

    def _share(self) -> None:
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, AdamW's state with it."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is not None:
                self._step(p, p.grad, group)
        self.adamw.step()
        return loss

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(average, group["momentum"]) if group["nesterov"] else average
        update = orthogonalised(ahead.flatten(1), group["ns_steps"])
        scale = math.sqrt(max(1, update.shape[0] / update.shape[1]))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * scale)


def hidden_weights(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The weights of a network, in its order, that belong to Muon itself.

    Raises:
        InputError: There are none.
    """
    hidden = [p for p in parameters if p.ndim >= 2][1:-1]
    if not hidden:
        raise InputError(
            "optimizer Muon works on hidden weights, and this network has none between its "
            "first and its last layer; choose AdamW."
        )
    return hidden


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # a, b, c of Jordan et al. 2024


def orthogonalised(G: Tensor, steps: int) -> Tensor:
    """Roughly UVᵀ of G = USVᵀ, shape `(m, n)`, by quintic Newton–Schulz iteration in bfloat16.

    X ← aX + (bA + cA²)X with A = XXᵀ. The coefficients (Jordan et al. 2024) are steepest at zero
    and do not converge: singular values end between about 0.5 and 1.5, by intent.
    """
    a, b, c = NEWTON_SCHULZ
    X = G.bfloat16()
    X = X / X.norm().clamp_min(1e-7)
    wide = X.shape[0] <= X.shape[1]
    X = X if wide else X.T  # the smaller of the two possible A
    for _ in range(steps):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide else X.T
