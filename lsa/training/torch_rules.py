"""The rules of torch's own optimizers, as `preconditioners` describes them.

Each gain k is that of the average for a gradient of alternating sign: 1/(1+β) for heavy ball,
(1+2β)/(1+β) for Nesterov, (1−β)/(1+β) for an exponential average. Thresholds of gradient descent
and momentum: Cohen et al. 2021, arXiv 2103.00065; of Adam, 38/η at β₁ = 0.9: Cohen et al. 2022,
arXiv 2207.14484.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lsa.training.preconditioners import Rule, edge, preconditioner


def momentum_edge(group: Mapping[str, Any], rate: float) -> tuple[float | None, str]:
    """Threshold and formula of gradient descent at rate η, heavy ball or Nesterov."""
    beta = group.get("momentum", 0)
    if group.get("maximize") or group.get("dampening") or not 0 <= beta < 1:
        return None, ""
    if not beta:
        return edge(rate), "2/η"
    if group.get("nesterov"):
        return edge(rate, (1 + 2 * beta) / (1 + beta)), "2(1+β)/(η(1+2β))"
    return edge(rate, 1 / (1 + beta)), "2(1+β)/η"


@preconditioner(torch.optim.SGD)
def sgd(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """P = 1."""
    P = torch.ones_like(parameter, dtype=torch.float64)
    threshold, formula = momentum_edge(group, float(group["lr"]))
    return Rule(P, threshold, formula, group["weight_decay"])


@preconditioner(torch.optim.RMSprop)
def rmsprop(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """P = √v + ε, v centred where the optimizer centres it."""
    P = None
    if state:
        v = state["square_avg"].double()
        if group["centered"]:
            v = v - state["grad_avg"].double().square()
        P = v.sqrt() + group["eps"]
    threshold, formula = momentum_edge(group, float(group["lr"]))
    return Rule(P, threshold, formula, group["weight_decay"])


@preconditioner(torch.optim.Adagrad)
def adagrad(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """P = √∑g² + ε, with the decayed learning rate of the last step."""
    steps = int(state.get("step", 0))  # torch makes this state before the first step
    P = state["sum"].double().sqrt() + group["eps"] if steps else None
    threshold, formula = momentum_edge(group, decayed(group, steps))
    return Rule(P, threshold, formula, group["weight_decay"])


def decayed(group: Mapping[str, Any], steps: int) -> float:
    """η of the last of some steps: Adagrad's falls with them; nan where the optimizer sets it."""
    rate = math.nan if group["lr"] is None else float(group["lr"])
    return rate / (1 + max(steps - 1, 0) * group.get("lr_decay", 0.0))


@preconditioner(torch.optim.AdamW)
def adamw(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule | str:
    """Adam's rule with decoupled decay, which groups of torch before 2.6 do not say."""
    return adam(parameter, {**group, "decoupled_weight_decay": True}, state)


@preconditioner(torch.optim.Adam)
def adam(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """P = (1 − β₁ᵗ)(√(v/(1 − β₂ᵗ)) + ε): the correction for the start of the averages is in P."""
    beta1, beta2 = map(float, group["betas"])
    P = None
    if state:
        steps = int(state["step"])
        v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double()
        P = (1 - beta1**steps) * ((v / (1 - beta2**steps)).sqrt() + group["eps"])
    return averaged(P, group, (1 - beta1) / (1 + beta1), "(1+β₁)/((1−β₁)η)")


@preconditioner(torch.optim.NAdam)
def nadam(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """P = √(v/(1 − β₂ᵗ)) + ε; k = a + b(1−β₁)/(1+β₁), a and b as of the last step.

    The step is −ηP⁻¹(a g + b m), m the average of the gradients g (Dozat 2016, algorithm 2).
    """
    if not state:
        return Rule(None, None)
    beta1, beta2 = map(float, group["betas"])
    steps = int(state["step"])
    P = (state["exp_avg_sq"].double() / (1 - beta2**steps)).sqrt() + group["eps"]

    def mu(step: int) -> float:
        return beta1 * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))

    product = float(state["mu_product"])
    a = (1 - mu(steps)) / (1 - product)
    b = mu(steps + 1) / (1 - product * mu(steps + 1))
    return averaged(P, group, a + b * (1 - beta1) / (1 + beta1), "/((a+b(1−β₁)/(1+β₁))η)")


@preconditioner(torch.optim.RAdam)
def radam(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """Adam's P over the rectification r; 1 − β₁ᵗ while there are too few steps for a variance.

    Liu et al. 2020, arXiv 1908.03265, algorithm 2.
    """
    beta1, beta2 = map(float, group["betas"])
    P = None
    if state:
        steps = int(state["step"])
        last = 2 / (1 - beta2) - 1
        rho = last - 2 * steps * beta2**steps / (1 - beta2**steps)
        P = torch.ones_like(parameter, dtype=torch.float64)
        if rho > 5:
            r = (rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)
            P = (state["exp_avg_sq"].double().sqrt() + group["eps"]) / (
                r * (1 - beta2**steps)
            ) ** 0.5
        P = (1 - beta1**steps) * P
    return averaged(P, group, (1 - beta1) / (1 + beta1), "(1+β₁)/((1−β₁)η)")


@preconditioner(torch.optim.Adadelta)
def adadelta(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """P = √(v + ε)/√(u + ε), u the average of squared steps (Zeiler 2012, arXiv 1212.5701)."""
    P = None
    if state:
        v, u = state["square_avg"].double(), state["acc_delta"].double()
        P = ((v + group["eps"]) / (u + group["eps"])).sqrt()
    return averaged(P, group, 1.0, "/η")


@preconditioner(torch.optim.Adamax)
def adamax(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """P = (1 − β₁ᵗ)u, u the largest recent gradient."""
    beta = float(group["betas"][0])
    P = (1 - beta ** int(state["step"])) * state["exp_inf"].double() if state else None
    return averaged(P, group, (1 - beta) / (1 + beta), "(1+β₁)/((1−β₁)η)")


def averaged(P: Tensor | None, group: Mapping[str, Any], gain: float, formula: str) -> Rule:
    """The rule of a step by averages, with either kind of weight decay; the formula ends so."""
    rate, weight_decay = float(group["lr"]), group["weight_decay"]
    decoupled = group.get("decoupled_weight_decay")
    decay = rate * weight_decay if decoupled else 0.0
    threshold = None if group.get("maximize") else edge(rate, gain, decay)
    return Rule(
        P,
        threshold,
        f"{'(2−ηλ)' if decay else '2'}{formula}",
        0.0 if decoupled else weight_decay,
    )


@preconditioner("torch:Adafactor")  # from 2.5 on
def adafactor(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """P = √v η/α with v factored and α the relative step; the clipping of large steps is left out.

    Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5. α = min(η, 1/√t) max(ε₂, RMS(θ)).
    """
    rate = float(group["lr"])
    P = None
    if state and int(state["step"]):
        floor, least = group["eps"]
        floor = torch.finfo(parameter.dtype).eps if floor is None else floor
        if "row_var" in state:
            row, column = state["row_var"].double(), state["col_var"].double()
            v = row @ column / row.mean(dim=-2, keepdim=True).clamp_min(floor)
        else:
            v = state["variance"].double()
        size = parameter.detach().double().square().mean().sqrt().item()
        step = min(rate, int(state["step"]) ** -0.5) * max(least, size)
        P = v.clamp_min(floor**2).sqrt() * (rate / step if rate else 1.0)
    decay = rate * group["weight_decay"]
    threshold = None if group.get("maximize") else edge(rate, decay=decay)
    return Rule(P, threshold, f"{'(2−ηλ)' if decay else '2'}/η")


@preconditioner(torch.optim.Rprop)
def rprop(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Steps by signs."""
    return SIGNS


BOUNDED = (
    "of the same length however small the gradient is; so no curvature makes it diverge and there "
    "is no threshold"
)
SIGNS = "its step is the sign of the gradient or of an average, " + BOUNDED
