"""Thresholds against torch's optimizers on quadratics, preconditioners against hand-run ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lsa.runtime.errors import InputError
from lsa.training import optimizers, stability
from lsa.training.stability import OptimizerState

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# Every optimizer that is known, with the options that change its preconditioner or its step.
RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.8, "centered": True, "weight_decay": 0.02}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.3, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.03}),
    ("Adam", {"lr": 0.01, "betas": (0.5, 0.9), "amsgrad": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}),
]


def stepped(
    name: str, steps: int, **options: Any
) -> tuple[list[nn.Parameter], torch.optim.Optimizer, list[Tensor]]:
    """Two parameters after steps with random gradients, and those gradients, flat."""
    rng = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(torch.randn(s, generator=rng).double()) for s in ((2, 3), (4,))]
    optimizer = optimizers.build(name, parameters, **options)
    gradients = []
    for _ in range(steps):
        gradients.append(torch.randn(10, generator=rng).double())
        step(parameters, optimizer, gradients[-1])
    return parameters, optimizer, gradients


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, g: Tensor) -> None:
    for p, part in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view(p.shape).clone()
    optimizer.step()


def flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def kept(name: str, parameters: list[nn.Parameter], optimizer: Any) -> OptimizerState:
    return stability.read(name, optimizer.state_dict(), parameters, 16)


# --- preconditioners ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), RULES)
def test_the_next_step_is_that_of_the_real_optimizer(name, options):
    for steps in (0, 1, 4):
        parameters, optimizer, _ = stepped(name, steps, **options)
        found, before = kept(name, parameters, optimizer), flat(parameters)
        g = torch.linspace(-1, 2, 10, dtype=torch.float64)
        u = found.update(before, g)
        assert torch.equal(u, found.update(before, g)), "the state was changed"
        step(parameters, optimizer, g)
        torch.testing.assert_close(u, flat(parameters) - before, rtol=1e-12, atol=1e-15)


def test_the_preconditioner_of_adam_is_that_of_a_hand_run_adam():
    """v ← β₂v + (1−β₂)g², P = (1−β₁ᵗ)(√(v/(1−β₂ᵗ)) + ε); and the step is −η P⁻¹m, m undivided."""
    beta1, beta2, eps, lr = 0.8, 0.95, 1e-3, 0.01
    for steps in (1, 2, 7):
        options = {"lr": lr, "betas": (beta1, beta2), "eps": eps}
        parameters, optimizer, gradients = stepped("Adam", steps, **options)
        m = v = torch.zeros(10, dtype=torch.float64)
        for g in gradients:
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        expected = (1 - beta1**steps) * ((v / (1 - beta2**steps)).sqrt() + eps)
        P = kept("Adam", parameters, optimizer).preconditioner(flat(parameters))
        assert P is not None
        torch.testing.assert_close(P.diagonal, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(P.inverse_root(expected.sqrt()), torch.ones_like(expected))
        before, *_ = stepped("Adam", steps - 1, **options)
        moved = flat(parameters) - flat(before)
        torch.testing.assert_close(moved, -lr * m / P.diagonal, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("name", "options"), RULES)
def test_the_last_step_is_the_rate_times_the_average_over_the_preconditioner(name, options):
    """What the threshold assumes, read off the parameters alone."""
    parameters, optimizer, gradients = stepped(name, 5, **options)
    before, earlier, _ = stepped(name, 4, **options)
    found, old = kept(name, parameters, optimizer), kept(name, before, earlier)
    theta, last = flat(before), flat(parameters) - flat(before)
    g = gradients[-1] + found.penalty * theta
    preconditioner = found.preconditioner(theta)
    assert preconditioner is not None and (found.penalty > 0) == (
        options.get("weight_decay", 0) > 0 and name != "AdamW"
    )
    P = preconditioner.diagonal
    if name in ("Adam", "AdamW"):
        average = found.state["exp_avg"] / P
    elif name == "RMSprop" and "momentum" in options:  # averages what is already divided
        average = options["momentum"] * old.state["momentum_buffer"] + g / P
    else:
        average = g / P
        if "momentum" in options:
            average = options["momentum"] * old.state["momentum_buffer"] + g
        if "nesterov" in options:
            average = g + options["momentum"] * average
    decay = options["weight_decay"] if name == "AdamW" else 0.0
    expected = -found.learning_rate * (average + decay * theta)
    torch.testing.assert_close(last, expected, rtol=1e-10, atol=1e-14)


def test_before_the_first_step_only_sgd_has_a_preconditioner():
    for name, options in RULES:
        parameters, optimizer, _ = stepped(name, 0, **options)
        found = kept(name, parameters, optimizer)
        P = found.preconditioner(flat(parameters))
        assert found.steps == 0 and found.learning_rate == options["lr"]
        assert (P is None) == (name != "SGD")


def test_the_rate_is_the_one_that_a_schedule_has_reached():
    parameters, optimizer, _ = stepped("AdamW", 2, lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.025
    found = kept("AdamW", parameters, optimizer)
    assert found.learning_rate == 0.025
    parameters, optimizer, _ = stepped("Adagrad", 3, lr=0.1, lr_decay=0.5)
    assert kept("Adagrad", parameters, optimizer).learning_rate == pytest.approx(0.1 / 2)


def test_frozen_parameters_are_no_part_of_it():
    parameters, optimizer, _ = stepped("Adam", 3)
    parameters[0].requires_grad_(False)
    found = kept("Adam", parameters, optimizer)
    P = found.preconditioner(parameters[1].detach())
    assert P is not None and P.diagonal.shape == (4,)
    assert torch.equal(found.state["exp_avg"], optimizer.state[parameters[1]]["exp_avg"])


@pytest.mark.parametrize("name", ["SAM", "NAdam", "LBFGS", "package.module:Mine"])
def test_other_optimizers_are_refused_in_one_line(name):
    with pytest.raises(InputError, match="no preconditioner that is known") as caught:
        stability.read(name, {"state": {}, "param_groups": []}, [], 16)
    assert "\n" not in str(caught.value)


def test_a_state_that_is_not_there_or_not_whole_is_refused():
    parameters, optimizer, _ = stepped("Adam", 3)
    for stored in ({}, {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}):
        with pytest.raises(InputError, match="keeps no state of Adam over the 2 parameters"):
            stability.read("Adam", stored, parameters, 16)
    parameters[0].grad = None
    optimizer.step()
    with pytest.raises(InputError, match="not stepped all trainable parameters equally"):
        kept("Adam", parameters, optimizer)
    parameters, optimizer, _ = stepped("Adam", 3)
    optimizer.state[parameters[0]]["exp_avg_sq"].fill_(float("nan"))
    with pytest.raises(InputError, match="second moment of Adam is not positive"):
        kept("Adam", parameters, optimizer).preconditioner(flat(parameters))


# --- thresholds -----------------------------------------------------------------------------------

# P ≈ ε: against an ε so large the second moment is nothing, and real steps have a P at rest.
AT_REST: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 2.0}),
    ("RMSprop", {"lr": 1e6, "eps": 1e8}),
    ("RMSprop", {"lr": 1e6, "eps": 1e8, "momentum": 0.7, "weight_decay": 3.0}),
    ("Adagrad", {"lr": 1e6, "eps": 1e8}),
    ("Adam", {"lr": 1e7, "eps": 1e8}),
    ("Adam", {"lr": 1e7, "eps": 1e8, "betas": (0.5, 0.99), "weight_decay": 2.0}),
    ("AdamW", {"lr": 1e7, "eps": 1e8, "weight_decay": 0.0}),
    ("AdamW", {"lr": 1e7, "eps": 1e8, "weight_decay": 4e-8}),  # ηλ = 0.4
]


def run(name: str, curvature: float, **options: Any) -> tuple[float, OptimizerState]:
    """How much |x| grew from one hundred steps of torch's optimizer on ½ h x² to the next."""
    x = nn.Parameter(torch.full((), 1e-12, dtype=torch.float64))  # gradients far below ε
    optimizer = optimizers.build(name, [x], **options)
    largest = [0.0, 0.0, 0.0, 0.0]
    for i in range(400):
        # At first none, so that Adam's correction for the start of its averages has died out.
        x.grad = (curvature if i >= 200 else 0.0) * x.detach()
        optimizer.step()
        largest[i // 100] = max(largest[i // 100], x.abs().item())
    return largest[3] / largest[2], stability.read(name, optimizer.state_dict(), [x], 1)


@pytest.mark.parametrize(("name", "options"), AT_REST)
def test_steps_below_the_threshold_converge_and_above_it_diverge(name, options):
    _, found = run(name, 0.0, **options)
    P = found.preconditioner(torch.ones(1))
    assert P is not None and found.threshold is not None
    edge = found.threshold[0] * P.diagonal.item() - found.penalty  # of h: sharpness is (h + λ)/P
    assert run(name, 0.998 * edge, **options)[0] < 1
    assert run(name, 1.002 * edge, **options)[0] > 1


def test_the_threshold_of_adam_is_38_over_its_rate():
    parameters, optimizer, _ = stepped("Adam", 2, lr=0.01)
    found = kept("Adam", parameters, optimizer).threshold
    assert found == (pytest.approx(38 / 0.01), "2(1+β₁)/((1−β₁)η)")


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad"])
def test_ascent_has_no_threshold(name):
    parameters, optimizer, _ = stepped(name, 2, maximize=True)
    assert kept(name, parameters, optimizer).threshold is None


def diverges(curvature: float, options: dict) -> bool:
    """Whether 2000 steps of torch's SGD on ½ λ x² lead away from 0."""
    x = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = optimizers.build("SGD", [x], **options)
    for _ in range(2000):
        x.grad = curvature * x.detach()
        optimizer.step()
    return not x.abs().item() < 1  # nan has overflowed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "weight_decay": 3.0},
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 3.0},
        {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 3.0},
    ],
)
def test_the_stability_threshold_is_found_by_bisection_on_a_quadratic(options):
    found = stability.stability_threshold("SGD", options)
    assert found is not None
    low, high = 0.5 * found[0], 1.5 * found[0]
    while high - low > 2e-4 * found[0]:
        middle = (low + high) / 2
        low, high = (low, middle) if diverges(middle, options) else (middle, high)
    assert found[0] == pytest.approx((low + high) / 2, rel=1e-3)
    assert found[1].endswith("weight decay") == ("weight_decay" in options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"lr": 0.1}),
        ("SAM", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
        ("SGD", {"lr": 0.1, "maximize": True}),
        ("SGD", {"lr": 0.0}),
        ("SGD", {"lr": 0.1, "momentum": 1.0}),
    ],
)
def test_what_has_no_threshold_of_the_raw_hessian_gets_none(name, options):
    assert stability.stability_threshold(name, options) is None
