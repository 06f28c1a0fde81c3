"""The rules of optimizers of other packages, which need not be installed.

`schedulefree` (Defazio et al. 2024, arXiv 2405.15682), `pytorch_optimizer` and `torch_optimizer`
(Shampoo: Gupta et al. 2018, arXiv 1802.09568; SOAP: Vyas et al. 2024, arXiv 2409.11321), and Lion
(Chen et al. 2023, arXiv 2302.06675).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lsa.training.preconditioners import Preconditioner, Rule, edge, preconditioner, rotated
from lsa.training.torch_rules import SIGNS


@preconditioner("schedulefree:SGDScheduleFree", "pytorch_optimizer:ScheduleFreeSGD")
def schedule_free_sgd(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Rule:
    """P = 1; weight decay belongs to the gradient."""
    P = torch.ones_like(parameter, dtype=torch.float64)
    threshold, formula, _ = _schedule_free(group, group["momentum"])
    return Rule(P, threshold, formula, group["weight_decay"])


@preconditioner("schedulefree:AdamWScheduleFree", "pytorch_optimizer:ScheduleFreeAdamW")
def schedule_free_adamw(
    parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Rule:
    """P = √(v/(1 − β₂ᵗ)) + ε; decoupled weight decay λy lowers the threshold by λ."""
    beta1, beta2 = map(float, group["betas"])
    threshold, formula, steps = _schedule_free(group, beta1)
    if threshold is not None and (decay := group["weight_decay"]):
        threshold, formula = threshold - decay, f"{formula} − λ"
        threshold = threshold if threshold > 0 else None
    P = None
    if state:
        v = state.get("max_exp_avg_sq", state["exp_avg_sq"]).double()
        P = (v / (1 - beta2**steps)).sqrt() + group["eps"]
    return Rule(P, threshold, formula)


def _schedule_free(group: Mapping[str, Any], beta: float) -> tuple[float | None, str, int]:
    """Threshold, its formula and the steps taken.

    z ← z − ηP⁻¹g(y), x ← (1−c)x + cz, y = (1−β)z + βx: an alternating z moves y by
    (1−β+βc/(2−c))z, which is k. c, the weight of the last step in x, is that of the last step.
    """
    steps = int(group.get("k", group.get("step", 0)))
    warm_up = min(1.0, steps / group["warmup_steps"]) if group["warmup_steps"] else 1.0
    rate = float(group["lr"]) * (warm_up if steps else 1.0)
    c = 0.0
    if group["weight_sum"]:
        weight = steps ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        c = float(weight / group["weight_sum"])
    gain = 1 - beta + beta * c / (2 - c)
    return edge(rate, gain), "2/((1−β+βc/(2−c))η)", steps


@preconditioner("pytorch_optimizer:Shampoo", "torch_optimizer:Shampoo")
def shampoo(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    """P⁻¹ is a product of powers of one statistic per side, as the optimizer keeps them.

    Momentum is fed back through P, so with it there is a P and no threshold.
    """
    P = None
    if state:
        names = [n for n in state if n.startswith(("inv_pre_cond_", "inv_precond_"))]
        powers = [torch.linalg.eigh(state[name].double()) for name in sorted(names)]
        values = torch.ones((), dtype=torch.float64, device=parameter.device)
        for eigenvalues, _ in powers:
            values = values[..., None] * eigenvalues
        if (values > 0).all():  # all zero until the powers are first computed
            P = rotated(1 / values.view(parameter.shape), [Q for _, Q in powers])
    rate, weight_decay = float(group["lr"]), group["weight_decay"]
    if not group.get("weight_decouple"):
        threshold = None if group["momentum"] else edge(rate)
        return Rule(P, threshold, "2/η", weight_decay)
    decay = weight_decay * (1.0 if group.get("fixed_decay") else rate)
    threshold = None if group["momentum"] else edge(rate, decay=decay)
    return Rule(P, threshold, "(2−ηλ)/η" if decay else "2/η")


@preconditioner("pytorch_optimizer:SOAP")
def soap(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule | str:
    """Adam in the eigenbases of Shampoo; decay follows the step: (2−ηλ)(1+β₁)/((1−β₁)(1−ηλ)η)."""
    if group["merge_dims"] or group["normalize_gradient"]:
        return "with merge_dims or normalize_gradient its preconditioner is not read"
    beta1, beta2 = map(float, group["betas"])
    rate, steps = float(group["lr"]), int(group.get("step", 1)) - 1  # the first only takes measure
    P: Preconditioner | None = None
    if state and steps > 0:
        values = state["exp_avg_sq"].double().sqrt() + group["eps"]
        if group["correct_bias"]:
            values = values * ((1 - beta1**steps) / math.sqrt(1 - beta2**steps))
        P = rotated(values, [Q if len(Q) else None for Q in state["Q"]])
    decay = rate * group["weight_decay"]
    gain = (1 - beta1) / (1 + beta1) * (1 - decay)
    formula = "(1+β₁)/((1−β₁)η)"
    if decay:
        formula = "(2−ηλ)(1+β₁)/((1−β₁)(1−ηλ)η)"
    return Rule(P, edge(rate, gain, decay), formula if decay else f"2{formula}")


@preconditioner("lion_pytorch:Lion", "pytorch_optimizer:Lion", "torchao:Lion")
def lion(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Steps by signs."""
    return SIGNS
