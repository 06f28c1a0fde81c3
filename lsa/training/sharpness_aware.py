"""Sharpness-aware minimisation (Foret et al. 2021) around any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class SAM(Optimizer):
    """Sharpness-aware minimisation: the base optimizer's step from ∇L(θ + ρ ∇L(θ)/‖∇L(θ)‖).

    Foret et al. 2021, algorithm 1 with p = 2; ρ = 0.05 is the value that implementations start
    from. The norm runs over all parameters. State and parameter groups *are* those of the base
    optimizer, so a schedule and `state_dict` see one optimizer, with `rho` in each group. A step
    costs two gradients, and batch norm, in training mode, sees both.

    Args:
        base: Takes the step; must be able to do so from one gradient, without a closure.
        rho: Radius ρ of the neighbourhood, ≥ 0.
    """

    def __init__(self, base: Optimizer, rho: float = 0.05) -> None:
        self.base = base
        super().__init__(base.param_groups, {"rho": rho})
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`, that of the base optimizer included."""
        self.base.load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        """One step; evaluates `closure` twice and returns the loss at θ, the unperturbed point."""
        with torch.enable_grad():
            loss = closure()
        graded = [
            (p, group["rho"])
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norm = torch.stack([p.grad.norm() for p, _ in graded]).norm()
        # A copy, because (θ + ε) − ε is not θ in floating point.
        theta = [p.clone() for p, _ in graded]
        try:
            for p, rho in graded:
                p.add_(p.grad * (rho / norm.clamp_min(1e-12)))
            with torch.enable_grad():
                closure()
        finally:
            for (p, _), original in zip(graded, theta, strict=True):
                p.copy_(original)
        self.base.step()
        return loss
