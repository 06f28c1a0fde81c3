"""Preconditioned sharpness against closed forms, dense matrices and torch's own steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call, grad

from lsa.figures.preconditioned import draw
from lsa.landscape import Landscape, flatten
from lsa.probe import Result
from lsa.probes import preconditioned as module
from lsa.probes.preconditioned import preconditioned
from lsa.runtime.errors import InputError
from lsa.training import data, muon_state, optimizers, stability
from lsa.training.preconditioners import Preconditioner, Rule, preconditioner
from lsa.training.stability import OptimizerState

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def measure(landscape: Landscape, theta: Tensor, optimizer: Any, **options: Any) -> Result:
    options = {"k": 2, "tol": 1e-8} | options
    return preconditioned(landscape, theta, optimizer, generator(), lambda *_: None, **options)


def stepped(
    landscape: Landscape, theta: Tensor, name: str, steps: int = 3, batch: int = 20, **options: Any
) -> tuple[OptimizerState, Tensor, torch.optim.Optimizer]:
    """An optimizer of torch after steps on the landscape: its state, θ, and itself."""
    p = nn.Parameter(theta.clone())
    optimizer = getattr(torch.optim, name)([p], **options)
    for _ in range(steps):
        p.grad = landscape.gradient(p.detach())
        optimizer.step()
    return stability.read(optimizer, [p], batch), p.detach().clone(), optimizer


@pytest.fixture(scope="module")
def net() -> tuple[Landscape, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    y = torch.randint(0, 4, (60,), generator=generator(2))
    return Landscape(model, normal(60, 6), y, chunk=32), flatten(model)


def dense(matvec: Any, d: int) -> Tensor:
    return torch.stack([matvec(e) for e in torch.eye(d, dtype=torch.float64)], dim=1)


class Bowl(nn.Module):
    """ℓᵢ(w) = sᵢ ∑ hⱼ wⱼ²/2 with the mean of s one, so that H = diag(h)."""

    def __init__(self, h: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones_like(h))
        self.h = h

    def forward(self, s: Tensor) -> Tensor:
        return 0.5 * s * (self.h * self.w.square()).sum()


def test_a_diagonal_hessian_with_a_second_moment_made_by_hand():
    """Adam with hⱼ/Pⱼ known: another coordinate is the sharpest than without P."""
    h = torch.tensor([9.0, 4.0, 1.0, 0.5], dtype=torch.float64)
    v = torch.tensor([4.0, 0.01, 0.25, 1.0], dtype=torch.float64)
    s = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)[:, None]
    landscape = Landscape(Bowl(h), s, torch.zeros(3), lambda o, y: o.mean())
    adam = torch.optim.Adam([p := nn.Parameter(v)], lr=0.01, eps=1e-2)
    moments = {"exp_avg": torch.zeros_like(v), "exp_avg_sq": v * (1 - 0.999**5)}
    adam.state[p] = {"step": torch.tensor(5.0), **moments}
    optimizer = OptimizerState(adam, [p], 3)
    found = measure(landscape, torch.ones(4, dtype=torch.float64), optimizer, k=4)
    P = (1 - 0.9**5) * (torch.tensor([2.0, 0.1, 0.5, 1.0], dtype=torch.float64) + 0.01)
    felt = (h / P).sort(descending=True).values
    assert found.curves["preconditioned_eigenvalue"].y == pytest.approx(felt.numpy(), rel=1e-12)
    assert found.curves["raw_eigenvalue"].y == pytest.approx(h.numpy(), rel=1e-12)
    sharpness, ratio = found.metrics["sharpness"], found.metrics["threshold_ratio"]
    assert sharpness.value == pytest.approx((h[1] / P[1]).item(), rel=1e-12)
    assert found.metrics["stability_threshold"].value == pytest.approx(3800)
    assert ratio.value == pytest.approx(sharpness.value / 3800)
    spread = 0.5 / 3**0.5 * sharpness.value  # of s, whose standard deviation is ½
    assert sharpness.errors["data"] == pytest.approx(spread)
    assert ratio.errors["data"] == pytest.approx(spread / 3800)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {"lr": 0.02, "weight_decay": 0.05}),
        ("AdamW", {"lr": 0.02, "weight_decay": 0.05}),
        ("RMSprop", {"lr": 0.01, "momentum": 0.5}),
        ("Adagrad", {"lr": 0.05}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    ],
)
def test_every_number_agrees_with_dense_matrices_and_a_real_step(net, name, options):
    landscape, theta = net
    state, theta, optimizer = stepped(landscape, theta, name, **options)
    found = measure(landscape, theta, state, k=3)
    H = dense(landscape.hessian(theta), len(theta))
    P = state.preconditioner(theta)
    assert P is not None
    penalty = 0.0 if name == "AdamW" else options.get("weight_decay", 0.0)
    identity = torch.eye(len(theta), dtype=torch.float64)
    # P⁻¹(H + λI) is not symmetric, yet its eigenvalues are real: those of the symmetric form.
    eigenvalues = torch.linalg.eigvals((H + penalty * identity) / P.diagonal[:, None])
    assert eigenvalues.imag.abs().max() < 1e-8 * eigenvalues.abs().max()
    expected = eigenvalues.real.sort(descending=True).values[:3]
    assert found.curves["preconditioned_eigenvalue"].y == pytest.approx(expected.numpy(), rel=1e-8)
    raw = torch.linalg.eigvalsh(H)[-1].item()
    assert found.metrics["lambda_max_raw"].value == pytest.approx(raw, rel=1e-10)
    ratio = expected[0].item() / found.metrics["stability_threshold"].value
    assert found.metrics["threshold_ratio"].value == pytest.approx(ratio)

    p = optimizer.param_groups[0]["params"][0]
    p.grad = landscape.gradient(theta)
    optimizer.step()
    u = p.detach() - theta
    along = (u @ H @ u / (u @ u)).item()
    assert found.metrics["update_curvature"].value == pytest.approx(along, rel=1e-9)
    assert found.converged and len(draw(found, "title").axes) == 2


def test_muon_agrees_with_dense_matrices_and_a_real_step():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        ).double()
    y = torch.randint(0, 3, (60,), generator=generator(2))
    landscape = Landscape(model, normal(60, 6), y)
    optimizer = optimizers.build("Muon", model.parameters(), lr=0.05)

    def step() -> Tensor:
        for p, g in zip(
            model.parameters(),
            landscape.unflatten(landscape.gradient(flatten(model))).values(),
            strict=True,
        ):
            p.grad = g.clone()
        optimizer.step()
        return flatten(model)

    for _ in range(3):
        theta = step()
    state = stability.read(optimizer, list(model.parameters()), 20)
    found = measure(landscape, theta, state, k=3)
    H = dense(landscape.hessian(theta), len(theta))
    P = state.preconditioner(theta)
    assert P is not None
    root = dense(P.inverse_root, len(theta))
    eigenvalues = torch.linalg.eigvals(root @ root @ H).real.sort(descending=True).values[:3]
    assert found.curves["preconditioned_eigenvalue"].y == pytest.approx(
        eigenvalues.numpy(), rel=1e-8
    )
    # Its rates are in P: of a hidden weight's block, 1 is its own threshold.
    hidden = slice(35, 55)
    block = torch.linalg.inv(root @ root)[hidden, hidden]
    limit = (2 - 0.05 * 0.01) * 1.95 / (0.05 * 2.9 * 0.05)
    weight = model[2].weight
    own = muon_state.muon(weight, optimizer.param_groups[0], optimizer.state[weight])
    assert own.threshold == pytest.approx(limit) and isinstance(own.P, Preconditioner)
    torch.testing.assert_close(block.diagonal(), limit * own.P.diagonal, rtol=1e-7, atol=0)
    assert found.metrics["stability_threshold"].value == 1
    assert found.metrics["threshold_ratio"].value == pytest.approx(eigenvalues[0].item())
    u = step() - theta
    along = (u @ H @ u / (u @ u)).item()
    assert found.metrics["update_curvature"].value == pytest.approx(along, rel=1e-9)
    assert "stability threshold of Muon: 1, since the rates of the groups are in P" in found.notes


def trained(groups: Any, steps: int = 3, make: Any = torch.optim.AdamW) -> Any:
    """A network with its landscape and a live optimizer that has stepped on it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    y = torch.randint(0, 2, (30,), generator=generator(2))
    landscape = Landscape(model, normal(30, 4), y)
    optimizer = make(groups(model))
    for _ in range(steps):
        named = landscape.unflatten(landscape.gradient(flatten(model)))
        for name, p in model.named_parameters():
            p.grad = named[name].clone() if p.requires_grad else None
        optimizer.step()
    return model, landscape, optimizer


def test_a_live_optimizer_with_groups_of_their_own_rates_has_the_threshold_one():
    """Decay on weights alone, three rates, the parameters in another order than θ."""

    def groups(m: Any) -> list[dict[str, Any]]:
        return [
            {"params": [m[2].bias, m[0].bias], "weight_decay": 0.0, "lr": 0.02},
            {"params": [m[0].weight], "weight_decay": 0.1, "lr": 0.5},
            {"params": [m[2].weight], "weight_decay": 0.1, "lr": 0.0},
        ]

    model, landscape, optimizer = trained(groups)
    theta = flatten(model)
    before = [p.detach().clone() for p in model.parameters()]
    found = measure(landscape, theta, optimizer, k=3, batch_size=10)
    assert all(map(torch.equal, before, model.parameters()))
    H, rates = dense(landscape.hessian(theta), len(theta)), []
    for name, p in model.named_parameters():
        rate = {"0.weight": 0.5, "2.weight": 0.0}.get(name, 0.02)
        v = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)
        P = (1 - 0.9**3) * (v.sqrt() + 1e-8)
        decay = 0.1 * rate if "weight" in name else 0.0
        rates.append((rate / (19 * (2 - decay)) / P).flatten())
    expected = torch.linalg.eigvals(torch.cat(rates)[:, None] * H).real.max().item()
    assert found.metrics["threshold_ratio"].value == pytest.approx(expected, rel=1e-8)
    assert found.metrics["stability_threshold"].value == 1
    assert found.metrics["batch_sharpness"].errors and found.metrics["sharpness"].unit == ""
    assert len(draw(found, "title").axes) == 2


def test_frozen_parts_and_parameters_outside_of_the_optimizer_stand_still():
    model, landscape, optimizer = trained(lambda m: m[2].parameters())
    whole = measure(landscape, flatten(model), optimizer)
    assert "15 parameters are not moved by AdamW: P⁻¹ is 0 there" in whole.notes
    model[0].requires_grad_(False)
    part = Landscape(model, landscape.x, landscape.y)
    restricted = measure(part, flatten(model), optimizer)
    for name in ("threshold_ratio", "stability_threshold"):
        assert whole.metrics[name].value == pytest.approx(restricted.metrics[name].value)
    assert part.dimension == 8 and not any("not moved" in note for note in restricted.notes)


class Own(torch.optim.AdamW):
    """Somebody's AdamW."""


class Changed(torch.optim.AdamW):
    """With a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_derived_class_is_read_as_its_base_and_a_step_of_its_own_is_said():
    results = []
    for make in (torch.optim.AdamW, Own, Changed):
        model, landscape, optimizer = trained(lambda m: m.parameters(), make=make)
        results.append(measure(landscape, flatten(model), optimizer))
    plain, own, changed = results
    for other in (own, changed):
        assert other.metrics["threshold_ratio"].value == plain.metrics["threshold_ratio"].value
    assert not any("of its own" in note for note in own.notes)
    assert "Changed has a step of its own; it is read as AdamW" in changed.notes


def test_a_scheduler_on_the_live_optimizer_does_not_make_it_step():
    """A scheduler hangs a step on the instance, which a copy must not call."""
    model, landscape, optimizer = trained(lambda m: m.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    before = flatten(model)
    found = measure(landscape, before, optimizer)
    assert torch.equal(flatten(model), before) and "update_curvature" in found.metrics
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


@pytest.mark.parametrize("name", ["SAM", "Rprop", "LBFGS"])
def test_without_a_preconditioner_the_other_numbers_remain(net, name):
    landscape, theta = net
    p = nn.Parameter(theta.clone())
    optimizer = optimizers.build(name, [p])
    found = measure(landscape, theta, stability.read(optimizer, [p], 20))
    assert {"lambda_max_raw", "batch_sharpness"} <= found.metrics.keys() and found.converged
    assert not {"sharpness", "threshold_ratio", "stability_threshold"} & found.metrics.keys()
    assert sum("preconditioner" in note for note in found.notes) == 1


def test_a_registered_rule_of_ones_own_is_used(net):
    class Halves(torch.optim.SGD):
        """P = 2."""

    @preconditioner(Halves)
    def _(parameter: Tensor, group: Any, state: Any) -> Rule:
        return Rule(torch.full_like(parameter, 2.0), 2 / group["lr"], "2/η")

    landscape, theta = net
    p = nn.Parameter(theta.clone())
    found = measure(landscape, theta, stability.read(Halves([p], lr=0.1), [p]))
    half = found.metrics["lambda_max_raw"].value / 2
    assert found.metrics["sharpness"].value == pytest.approx(half)
    assert "no batch_sharpness: give batch_size=…, the samples per training step" in found.notes


@pytest.mark.parametrize(
    ("name", "lr", "steps"), [("SGD", 0.12, 1000), ("RMSprop", 1e-4, 1000), ("Adam", 0.01, 1200)]
)
def test_full_batch_training_of_a_network_hovers_about_the_threshold(name, lr, steps):
    """Cohen et al. 2021 and 2022: sharpness rises to 2/η, of Adam to 38/η, and stays there."""
    split = data.load("digits", train_limit=200, val_limit=50)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))
    y = nn.functional.one_hot(split.y_train, 10).float()
    landscape = Landscape(model, split.x_train, y, lambda o, t: (o - t).square().sum(1).mean() / 2)
    p = nn.Parameter(flatten(model))
    optimizer = getattr(torch.optim, name)([p], lr=lr)
    ratios, raw = [], []
    for i in range(1, steps + 401):
        p.grad = landscape.gradient(p.detach())
        optimizer.step()
        if i == 50 or (i >= steps and i % 100 == 0):
            state = stability.read(optimizer, [p], 200)
            found = measure(landscape, p.detach().clone(), state, k=1, tol=1e-3).metrics
            ratios.append(found["threshold_ratio"].value)
            raw.append(found["lambda_max_raw"].value * lr / 2)
    first, *late = ratios
    assert first < 0.9 and np.mean(late) == pytest.approx(1, abs=0.1) and max(late) < 1.2
    assert name == "SGD" or max(raw) < 0.2  # of 2/η: the raw Hessian tells nothing of it


def test_sgd_feels_exactly_the_raw_hessian(net):
    landscape, theta = net
    found = measure(landscape, *stepped(landscape, theta, "SGD", lr=0.1)[1::-1])
    assert found.metrics["sharpness"].value == found.metrics["lambda_max_raw"].value
    assert found.metrics["sharpness"].errors == found.metrics["lambda_max_raw"].errors
    assert found.metrics["stability_threshold"].value == pytest.approx(20)


def test_the_error_over_the_data_is_the_spread_of_sample_curvatures(net):
    landscape, theta = net
    state, theta, _ = stepped(landscape, theta, "Adam")
    found = measure(landscape, theta, state)
    P = state.preconditioner(theta)
    assert P is not None
    z = torch.from_numpy(found.arrays["preconditioned_vectors"][:, 0]) / P.diagonal.sqrt()
    each = [landscape.subset(torch.tensor([i])).hessian(theta) for i in range(60)]
    curvatures = torch.stack([z @ product(z) for product in each])
    sharpness = found.metrics["sharpness"]
    assert curvatures.mean().item() == pytest.approx(sharpness.value)
    assert sharpness.errors["data"] == pytest.approx((curvatures.std() / 60**0.5).item())


def test_the_batch_sharpness_of_all_samples_is_that_of_the_gradient(net):
    landscape, theta = net
    state, theta, _ = stepped(landscape, theta, "SGD", batch=60)
    g = landscape.gradient(theta)
    expected = (g @ landscape.hessian(theta)(g) / (g @ g)).item()
    for size in (60, 64):
        found = measure(landscape, theta, replace(state, batch_size=size))
        assert found.metrics["batch_sharpness"].value == pytest.approx(expected)
        assert not found.metrics["batch_sharpness"].errors
        assert any("one batch of 60" in note for note in found.notes) == (size > 60)


def test_batch_sharpness_is_the_mean_over_all_mini_batches(net):
    """Every batch of 2 out of 6, by dense Hessians, against many random passes and their errors."""
    landscape, theta = net
    few = landscape.subset(torch.arange(6))
    each = [few.subset(torch.tensor([i])) for i in range(6)]
    gradients = torch.stack([one.gradient(theta) for one in each])
    hessians = torch.stack([dense(one.hessian(theta), len(theta)) for one in each])
    exact = []
    for batch in map(list, combinations(range(6), 2)):
        g, H = gradients[batch].mean(0), hessians[batch].mean(0)
        exact.append(g @ H @ g / (g @ g))
    rng = generator(4)
    passes = torch.tensor(
        [
            module._batch_sharpness(few, theta, 2, rng, [])["batch_sharpness"].value
            for _ in range(200)
        ]
    )
    error = (passes.std() / len(passes) ** 0.5).item()
    assert passes.mean().item() == pytest.approx(torch.stack(exact).mean().item(), abs=4 * error)


def test_mini_batches_have_their_own_batch_statistics():
    """As in training: against torch's own derivatives of the network in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model = model.double()
    x, y = normal(12, 3), torch.randint(0, 2, (12,), generator=generator(2))
    landscape, theta = Landscape(model, x, y), flatten(model)
    for norm in (m for m in model if isinstance(m, nn.BatchNorm1d)):
        norm.track_running_stats = False

    def loss(t: Tensor) -> Tensor:
        outputs = functional_call(model, landscape.unflatten(t), (x,))
        return nn.functional.cross_entropy(outputs, y)

    # By torch.autograd: torch.func's, unlike finite differences, is 3e-5 off for batch norm here.
    g, H = grad(loss)(theta), hessian(loss, theta)
    found = module._batch_sharpness(landscape, theta, 12, generator(), [])["batch_sharpness"]
    assert found.value == pytest.approx((g @ H @ g / (g @ g)).item())


def test_a_threshold_far_above_the_bars_is_written_and_a_near_one_drawn(net):
    landscape, theta = net
    for lr, lines in ((1.0, 1), (1e-4, 0)):
        found = measure(landscape, theta, stepped(landscape, theta, "SGD", lr=lr)[0])
        panel = draw(found, "title").axes[0]
        assert sum(line.get_linestyle() == "--" for line in panel.lines) == lines
        (text,) = (t.get_text() for t in panel.get_legend().get_texts())
        assert text.startswith(f"stability threshold {2 / lr:g}") and (lines or "(above)" in text)


def test_before_the_first_step_there_is_only_the_raw_hessian(net):
    landscape, theta = net
    found = measure(landscape, theta, stepped(landscape, theta, "Adam", steps=0)[0])
    assert {"lambda_max_raw", "stability_threshold", "update_curvature"} < found.metrics.keys()
    assert not {"sharpness", "threshold_ratio"} & found.metrics.keys()
    assert any("has not stepped yet" in note for note in found.notes) and found.converged
    assert len(draw(found, "title").axes) == 2


def test_without_a_threshold_there_is_no_ratio(net):
    landscape, theta = net
    state, theta, _ = stepped(landscape, theta, "SGD", momentum=0.9, dampening=0.5)
    found = measure(landscape, theta, state)
    assert "sharpness" in found.metrics
    assert not {"stability_threshold", "threshold_ratio"} & found.metrics.keys()
    assert any("none is known for these options" in note for note in found.notes)
    assert len(draw(found, "title").axes) == 2


def test_a_rate_of_zero_makes_no_step_to_look_along(net):
    landscape, theta = net
    found = measure(landscape, theta, stepped(landscape, theta, "SGD", lr=0.0)[0])
    assert "update_curvature" not in found.metrics
    assert any("the next step is zero" in note for note in found.notes)


def test_a_sharpness_that_hangs_on_one_sample_is_said(net):
    """A parameter that no gradient has reached has P = ε; now one sample excites it."""
    x = torch.zeros(40, 2, dtype=torch.float64)
    x[:, 0] = normal(40)
    x[7, 1] = 1.0
    model = nn.utils.skip_init(nn.Linear, 2, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
    y = torch.randint(0, 2, (40,), generator=generator(2))
    whole, theta = Landscape(model, x, y), flatten(model)
    others = whole.subset(torch.tensor([i for i in range(40) if i != 7]))
    state, theta, _ = stepped(others, theta, "Adam")
    (note,) = (n for n in measure(whole, theta, state, k=1).notes if "carries" in n)
    assert "one of 40 samples carries 100%" in note and "P=2.7e-09" in note  # (1 − 0.9³)ε
    usual = measure(*net, stepped(*net, "Adam")[0])
    assert not any("carries" in note for note in usual.notes)


def test_a_budget_that_is_too_small_is_said(net):
    landscape, theta = net
    state, theta, _ = stepped(landscape, theta, "Adam")
    found = measure(landscape, theta, state, max_products=3)
    assert not found.converged
    assert [note[:5] for note in found.notes[:2]] == ["H: no", "P⁻¹H:"]


def test_more_eigenvalues_than_there_are_is_refused(net):
    landscape, theta = net
    with pytest.raises(InputError, match="k=93: choose 1 to d=92"):
        measure(landscape, theta, stepped(landscape, theta, "SGD")[0], k=93)
