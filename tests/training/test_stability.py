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


def kept(parameters: list[nn.Parameter], optimizer: Any) -> OptimizerState:
    own = [p for p in parameters if p.requires_grad]
    return stability.read(optimizer, own, 16)


def flat_state(parameters: list[nn.Parameter], optimizer: Any, name: str) -> Tensor:
    return torch.cat([optimizer.state[p][name].reshape(-1) for p in parameters])


# --- preconditioners ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), RULES)
def test_the_next_step_is_that_of_the_real_optimizer(name, options):
    for steps in (0, 1, 4):
        parameters, optimizer, _ = stepped(name, steps, **options)
        found, before = kept(parameters, optimizer), flat(parameters)
        g = torch.linspace(-1, 2, 10, dtype=torch.float64)
        u = found.update(before, g)
        assert torch.equal(u, found.update(before, g)), "the state was changed"
        step(parameters, optimizer, g)
        torch.testing.assert_close(u, flat(parameters) - before, rtol=1e-12, atol=1e-15)


class Strict(torch.optim.SGD):
    """An optimizer that must have a closure, as that of one's own may."""

    def step(self, closure):  # pyright: ignore
        """One step."""
        assert closure() is not None
        return super().step()


class Bare(torch.optim.SGD):
    """An optimizer of one's own whose step takes nothing."""

    def step(self):  # pyright: ignore
        """One step."""
        return super().step()


@pytest.mark.parametrize("made", [Strict, Bare])
def test_the_next_step_of_an_optimizer_with_and_without_a_closure(made):
    parameters, _, _ = stepped("SGD", 0)
    found = kept(parameters, made(parameters, lr=0.1))
    g = torch.linspace(-1, 2, 10, dtype=torch.float64)
    torch.testing.assert_close(found.update(flat(parameters), g), -0.1 * g, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["SAM", "LBFGS"])
def test_what_evaluates_the_loss_again_makes_no_step_from_a_gradient(name):
    parameters, _, _ = stepped("SGD", 0)
    found = kept(parameters, optimizers.build(name, parameters, lr=0.1))
    with pytest.raises(InputError, match=f"{name} makes no step .*evaluates the loss more"):
        found.update(flat(parameters), torch.ones(10).double())


class TwoSteps(torch.optim.SGD):
    """SAM with one evaluation: from the gradient at hand up, from that of the closure down."""

    def step(self, closure):  # pyright: ignore
        """One step."""
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(p.grad, alpha=0.1)
        self.zero_grad()
        closure()
        return super().step()


def test_a_closure_at_other_weights_is_no_gradient_of_these():
    parameters, _, _ = stepped("SGD", 0)
    found = kept(parameters, TwoSteps(parameters, lr=0.1))
    with pytest.raises(InputError, match=r"TwoSteps makes no step .*at other weights"):
        found.update(flat(parameters), torch.ones(10).double())


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
        P = kept(parameters, optimizer).preconditioner(flat(parameters))
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
    found = kept(parameters, optimizer)
    theta, last = flat(before), flat(parameters) - flat(before)
    g = gradients[-1] + found.penalty * theta
    preconditioner = found.preconditioner(theta)
    assert preconditioner is not None and (found.penalty > 0) == (
        options.get("weight_decay", 0) > 0 and name != "AdamW"
    )
    P = preconditioner.diagonal
    if name in ("Adam", "AdamW"):
        average = flat_state(parameters, optimizer, "exp_avg") / P
    elif name == "RMSprop" and "momentum" in options:  # averages what is already divided
        average = options["momentum"] * flat_state(before, earlier, "momentum_buffer") + g / P
    else:
        average = g / P
        if "momentum" in options:
            average = options["momentum"] * flat_state(before, earlier, "momentum_buffer") + g
        if "nesterov" in options:
            average = g + options["momentum"] * average
    decay = options["weight_decay"] if name == "AdamW" else 0.0
    expected = -found.learning_rate * (average + decay * theta)
    torch.testing.assert_close(last, expected, rtol=1e-10, atol=1e-14)


def test_before_the_first_step_only_sgd_has_a_preconditioner():
    for name, options in RULES:
        parameters, optimizer, _ = stepped(name, 0, **options)
        found = kept(parameters, optimizer)
        P = found.preconditioner(flat(parameters))
        assert found.learning_rate == options["lr"]
        assert (P is None) == (name != "SGD")


def test_decay_of_adamw_is_decoupled_where_its_groups_do_not_say_so():
    """As those of torch before 2.6."""
    parameters, optimizer, _ = stepped("AdamW", 2, lr=0.5, weight_decay=0.4)
    optimizer.param_groups[0].pop("decoupled_weight_decay", None)
    found = kept(parameters, optimizer)
    assert found.penalty == 0
    assert found.threshold == (pytest.approx(1.8 * 19 / 0.5), "(2−ηλ)(1+β₁)/((1−β₁)η)")


def test_the_rate_is_the_one_that_a_schedule_has_reached():
    parameters, optimizer, _ = stepped("AdamW", 2, lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.025
    found = kept(parameters, optimizer)
    assert found.learning_rate == 0.025
    parameters, optimizer, _ = stepped("Adagrad", 3, lr=0.1, lr_decay=0.5)
    assert kept(parameters, optimizer).learning_rate == pytest.approx(0.1 / 2)


def test_frozen_parameters_are_no_part_of_it():
    parameters, optimizer, _ = stepped("Adam", 3)
    parameters[0].requires_grad_(False)
    found = kept(parameters, optimizer)
    P = found.preconditioner(parameters[1].detach())
    whole = kept([parameters[0].requires_grad_(True), parameters[1]], optimizer)
    both = whole.preconditioner(flat(parameters))
    assert P is not None and both is not None
    assert torch.equal(P.diagonal, both.diagonal[6:])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("SAM", "of SAM is not known"), ("LBFGS", "of LBFGS is not known"), ("Rprop", "the sign of")],
)
def test_what_has_no_preconditioner_says_so_in_one_line(name, reason):
    parameters = [nn.Parameter(torch.ones(3))]
    found = kept(parameters, optimizers.build(name, parameters))
    assert reason in found.reason and "\n" not in found.reason
    assert found.preconditioner(flat(parameters)) is None and found.threshold is None


def test_a_parameter_without_gradients_stands_still():
    parameters, optimizer, _ = stepped("Adam", 0)
    parameters[1].grad = torch.ones(4).double()
    optimizer.step()
    found = kept(parameters, optimizer)
    P = found.preconditioner(flat(parameters))
    assert P is not None and not P.inverse_root(torch.ones(10).double())[:6].any()
    assert found.notes == ["6 parameters are not moved by Adam: P⁻¹ is 0 there"]


def test_what_is_no_optimizer_of_the_network_is_refused():
    parameters, optimizer, _ = stepped("Adam", 1)
    with pytest.raises(InputError, match="Adam moves none of the network's 2 trainable"):
        kept([nn.Parameter(p.detach()) for p in parameters], optimizer)
    with pytest.raises(InputError, match="optimizer is a str, not a torch"):
        kept(parameters, "Adam")
    optimizer.state[parameters[0]]["exp_avg_sq"].fill_(float("nan"))
    with pytest.raises(InputError, match="second moment of Adam is not positive"):
        kept(parameters, optimizer).preconditioner(flat(parameters))


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
    ("NAdam", {"lr": 1e7, "eps": 1e8, "momentum_decay": 0.0}),  # μ stands still
    ("NAdam", {"lr": 1e7, "eps": 1e8, "momentum_decay": 5.0, "weight_decay": 2.0}),
    (
        "NAdam",
        {"lr": 1e7, "eps": 1e8, "momentum_decay": 5.0, "weight_decay": 4e-8}
        | {"decoupled_weight_decay": True},
    ),
    ("Adamax", {"lr": 1e7, "eps": 1e8}),
    ("RAdam", {"lr": 1e7, "eps": 1e8, "betas": (0.9, 0.9)}),  # r stands still early
    (
        "RAdam",
        {"lr": 1e7, "eps": 1e8, "betas": (0.5, 0.9), "weight_decay": 4e-8}
        | {"decoupled_weight_decay": True},
    ),
    ("RAdam", {"lr": 0.1, "betas": (0.5, 0.2)}),  # never a variance: averages alone
    ("RAdam", {"lr": 0.1, "betas": (0.5, 0.2), "weight_decay": 2.0}),
    ("Adadelta", {"lr": 0.1, "eps": 1e8}),
    ("Adadelta", {"lr": 0.1, "eps": 1e8, "weight_decay": 2.0}),
    ("Adafactor", {"lr": 0.04, "eps": (1e4, 1e6)}),  # η < 1/√400: the rate is not the relative one
    ("Adafactor", {"lr": 0.04, "eps": (1e4, 1e6), "weight_decay": 5.0}),
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
    return largest[3] / largest[2], stability.read(optimizer, [x], 1)


AT_REST = [(name, options) for name, options in AT_REST if hasattr(torch.optim, name)]


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
    found = kept(parameters, optimizer).threshold
    assert found == (pytest.approx(38 / 0.01), "2(1+β₁)/((1−β₁)η)")


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad"])
def test_ascent_has_no_threshold(name):
    parameters, optimizer, _ = stepped(name, 2, maximize=True)
    assert kept(parameters, optimizer).threshold is None


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
