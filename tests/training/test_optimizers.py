"""Optimizers through one interface, SAM and Muon against closed forms, schedules against torch."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from lsa.runtime.errors import InputError
from lsa.training import models, optimizers, schedules
from lsa.training.muon import orthogonalised

OF_TORCH = [
    name
    for name, found in vars(torch.optim).items()
    if isinstance(found, type)
    and issubclass(found, torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam", "Muon")
]


def network(hidden=(8, 6)):
    return models.build("mlp", input_shape=(1, 3, 3), classes=4, seed=0, hidden=hidden)


def closure_of(model, optimizer):
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 1, 3, 3, generator=rng), torch.randint(4, (32,), generator=rng)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def trained(name, steps, **options):
    """Weights and losses after some steps."""
    model = network()
    optimizer = optimizers.build(name, model.parameters(), **options)
    closure = closure_of(model, optimizer)
    losses = [optimizer.step(closure).item() for _ in range(steps)]
    return [p.detach().clone() for p in model.parameters()], losses


@pytest.mark.parametrize("name", [*OF_TORCH, "SAM", "Muon"])
def test_every_optimizer_descends_by_step_of_closure(name):
    _, losses = trained(name, 20)
    assert losses[-1] < losses[0]


def test_options_reach_the_torch_class():
    ours, _ = trained("SGD", 5, lr="1e-1", momentum=0.9, nesterov=True, fused=False)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    closure = closure_of(model, optimizer)
    for _ in range(5):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(ours, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
        ("AdamW", {"lr": 0.01}),
    ],
)
def test_a_parameter_is_updated_in_one_pass_as_torch_does_by_default(name, options):
    model = network()
    one_pass = optimizers.build(name, model.parameters(), **options)
    assert all(group["fused"] for group in one_pass.param_groups)
    for by_choice in ({"foreach": True}, {"fused": False}, {"differentiable": False}):
        chosen = optimizers.build(name, model.parameters(), **options, **by_choice)
        assert not any(group["fused"] for group in chosen.param_groups)
    ours, _ = trained(name, 5, **options)
    wanted, _ = trained(name, 5, **options, fused=False)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


class Failing(torch.optim.SGD):
    """Asks for an option that it has not."""

    def step(self, closure=None):
        """One step."""
        return self.param_groups[0]["rho"]


def test_what_fails_before_its_closure_is_told_with_the_cause():
    theta = nn.Parameter(torch.ones(1))
    with pytest.raises(InputError, match=r"Failing.step fails before .*KeyError: 'rho'"):
        optimizers.step(Failing([theta], lr=0.1), lambda: torch.zeros(()))


def test_lbfgs_solves_a_quadratic_in_one_step():
    A = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    options = {"max_iter": 50, "line_search_fn": "strong_wolfe"}
    optimizer = optimizers.build("LBFGS", [theta], **options)

    def closure():
        optimizer.zero_grad()
        loss = theta @ A @ theta / 2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(55.5)
    assert theta.detach().norm() < 1e-6  # tolerance_grad 1e-7 over the least eigenvalue


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SGD", {"lr": -1}, "optimizer SGD: lr=-1 is negative; choose a learning rate ≥ 0"),
        ("SGD", {"lr": "abc"}, "optimizer SGD: lr='abc' must be a valid number"),
        ("SGD", {"momentun": 0.9}, "Did you mean 'momentum'"),
        ("SGD", {"lr": 0.1, "nesterov": True}, r"refuses \(lr=0.1, nesterov=True\): Nesterov"),
        ("Adam", {"betas": [0.9, 1.9]}, "Invalid beta parameter at index 1: 1.9"),
        ("Muon", {"momentum": 1.0}, "momentum=1.0 must be less than 1"),
        ("sgd", {}, "unknown optimizer 'sgd'. Did you mean 'SGD'"),
        ("Optimizer", {}, "unknown optimizer"),
        ("SparseAdam", {}, "sparse gradients"),
        ("SAM", {"rho": -1}, "rho=-1 must be greater than or equal to 0"),
        ("SAM", {"base": "LBFGS"}, "base='LBFGS' evaluates the loss itself"),
        ("SAM", {"base": "SDG"}, "unknown optimizer 'SDG'. Did you mean 'SGD'"),
        ("SAM", {"momentun": 0.9}, "optimizer SGD has no option 'momentun'"),
        ("lion_pytorch:Lion", {}, "--trust lion_pytorch"),
        ("SAM", {"base": "lion_pytorch:Lion"}, "--trust lion_pytorch"),
        ("torch.nn:Linear", {}, "not a subclass of Optimizer"),
    ],
)
def test_bad_optimizers_are_refused_in_one_line(name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        optimizers.build(name, network().parameters(), **options)
    assert "\n" not in str(caught.value)


def test_class_of_torch_can_be_named_by_its_module():
    optimizer = optimizers.build("torch.optim:AdamW", network().parameters(), lr=0.1)
    assert type(optimizer) is torch.optim.AdamW


# ------------------------------------------------------------------------------------ SAM


def quadratic(optimizer, theta, A):
    def closure():
        optimizer.zero_grad()
        loss = theta @ A @ theta / 2
        loss.backward()
        return loss

    return closure


def test_sam_step_on_a_quadratic_in_closed_form():
    A = torch.diag(torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64))
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    theta = nn.Parameter(start.clone())
    optimizer = optimizers.build("SAM", [theta], rho=0.3, lr=0.1)
    loss = optimizer.step(quadratic(optimizer, theta, A))
    g = A @ start
    expected = start - 0.1 * A @ (start + 0.3 * g / g.norm())
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-14, atol=0)
    assert loss.item() == pytest.approx((start @ g / 2).item(), rel=1e-14)  # at θ, not at θ + ε


def test_sam_norm_runs_over_all_parameters():
    start = [torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    theta = [nn.Parameter(p.clone()) for p in start]
    optimizer = optimizers.build("SAM", theta, rho=0.5, lr=1.0)
    seen = []

    def closure():
        seen.append([p.item() for p in theta])
        optimizer.zero_grad()
        loss = sum((p.square().sum() / 2 for p in theta), torch.zeros((), dtype=torch.float64))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert seen == [[3.0, 4.0], [pytest.approx(3.3), pytest.approx(4.4)]]  # g/‖g‖ = (0.6, 0.8)


def test_sam_restores_the_weights_exactly():
    start, _ = trained("SAM", 0)
    after, _ = trained("SAM", 3, lr=0.0, rho=1.7)
    assert all(torch.equal(a, b) for a, b in zip(start, after, strict=True))


def test_sam_restores_the_weights_when_the_closure_fails():
    theta = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optimizers.build("SAM", [theta], rho=0.7)
    calls = iter([None, KeyboardInterrupt])

    def closure():
        optimizer.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        if problem := next(calls):
            raise problem
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(theta.detach(), torch.tensor([1.0, 2.0]))


def test_sam_stays_put_at_a_stationary_point():
    theta = nn.Parameter(torch.zeros(3))
    optimizer = optimizers.build("SAM", [theta], lr=1.0, rho=100.0)
    optimizer.step(quadratic(optimizer, theta, torch.eye(3)))
    assert torch.equal(theta.detach(), torch.zeros(3))


def test_sam_of_radius_zero_is_its_base():
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    sam, _ = trained("SAM", 4, rho=0.0, **options)
    sgd, _ = trained("SGD", 4, **options)
    assert all(torch.equal(a, b) for a, b in zip(sam, sgd, strict=True))


RESUMED = [
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SAM", {"lr": 0.1, "momentum": 0.9, "rho": 0.2}),
    ("SAM", {"base": "AdamW", "lr": 0.01}),
    ("SAM", {"base": "Muon"}),
    ("Muon", {}),
]


@pytest.mark.parametrize(("name", "options"), RESUMED)
def test_state_dict_resumes_the_same_trajectory(name, options):
    whole, _ = trained(name, 6, **options)
    model = network()
    first = optimizers.build(name, model.parameters(), **options)
    for _ in range(3):
        first.step(closure_of(model, first))
    state = first.state_dict()
    # Other options: what counts is in the state.
    second = optimizers.build(name, model.parameters(), **(options | {"lr": 0.7}))
    second.load_state_dict(state)
    for _ in range(3):
        second.step(closure_of(model, second))
    assert all(torch.equal(a, b) for a, b in zip(whole, model.parameters(), strict=True))


@pytest.mark.parametrize(("name", "options"), RESUMED)
def test_param_groups_steer_the_step_after_loading_too(name, options):
    model = network()
    optimizer = optimizers.build(name, model.parameters(), **options)
    optimizer.step(closure_of(model, optimizer))
    optimizer.load_state_dict(optimizer.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure_of(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(before)


# ----------------------------------------------------------------------------------- Muon


def test_orthogonalised_maps_the_singular_values_by_its_polynomial():
    rng = torch.Generator().manual_seed(0)
    G = torch.randn(7, 12, generator=rng)
    for matrix in (G, G.T):
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        s = S / S.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        # Each of five steps rounds three matrices to bfloat16, whose unit roundoff is 2⁻⁹.
        expected = U @ torch.diag(s) @ Vh
        found = orthogonalised(matrix, 5).double()
        assert (found - expected).norm() < 5 * 3 * 2**-9 * expected.norm()
        assert (torch.linalg.svdvals(found) - 1).abs().max() < 0.5


@pytest.mark.skipif("Muon" not in vars(torch.optim), reason="torch.optim.Muon is of torch 2.9")
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_agrees_with_torch_on_hidden_weights_and_adamw_on_the_rest(nesterov):
    options = {"lr": 0.03, "weight_decay": 0.1, "nesterov": nesterov}
    ours, _ = trained("Muon", 6, adamw_lr=0.004, **options)
    model = network()
    first, first_bias, hidden, *rest = model.parameters()
    muon = torch.optim.Muon([hidden], momentum=0.95, **options)
    adamw = torch.optim.AdamW(
        [first, first_bias, *rest], lr=0.004, betas=(0.9, 0.95), weight_decay=0.1
    )
    closure = closure_of(model, muon)
    for _ in range(6):
        adamw.zero_grad()
        closure()
        muon.step()
        adamw.step()
    for a, b in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif("Muon" not in vars(torch.optim), reason="torch.optim.Muon is of torch 2.9")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_a_convolution_as_a_matrix(layout):
    rng = torch.Generator().manual_seed(0)
    ends = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    conv = nn.Parameter(torch.randn(20, 2, 3, 3, generator=rng).to(memory_format=layout))
    matrix = nn.Parameter(conv.detach().flatten(1).contiguous())
    ours = optimizers.build("Muon", [ends[0], conv, ends[1]], lr=0.02, weight_decay=0.01)
    theirs = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.01)
    for _ in range(3):
        gradient = torch.randn(20, 2, 3, 3, generator=rng)
        conv.grad, matrix.grad = gradient.to(memory_format=layout), gradient.flatten(1)
        ours.step()
        theirs.step()
    torch.testing.assert_close(conv.detach().flatten(1), matrix.detach(), rtol=1e-6, atol=1e-7)


def test_muon_leaves_first_weight_head_and_biases_to_adamw():
    model = models.build("simple_cnn", input_shape=(3, 8, 8), classes=10, seed=0, width=4)
    optimizer = optimizers.build("Muon", model.parameters(), lr=0.5, adamw_lr=0.25)
    hidden, rest = (group["params"] for group in optimizer.param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in hidden] == ["3.weight", "6.weight", "10.weight"]
    assert len(hidden) + len(rest) == len(names) == len({id(p) for p in (*hidden, *rest)})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]


def test_muon_needs_a_hidden_weight():
    with pytest.raises(InputError, match="has none between its first and its last layer"):
        optimizers.build("Muon", network(hidden=[5]).parameters())


# ------------------------------------------------------------------------------- schedules


def of_torch(make, steps):
    """Multipliers by a scheduler of torch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(name, steps=60, **options):
    multiplier = schedules.schedule(name, epochs=12, steps_per_epoch=5, **options)
    return [multiplier(step) for step in range(steps)]


def test_constant_schedule():
    assert ours("constant") == [1.0] * 60


def test_cosine_schedule_agrees_with_torch():
    theirs = of_torch(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=60, eta_min=0.1), 60)
    assert ours("cosine", final=0.1) == pytest.approx(theirs, rel=1e-9)


def test_step_schedule_agrees_with_torch():
    theirs = of_torch(lambda o: lr_scheduler.MultiStepLR(o, milestones=[30, 45], gamma=0.2), 60)
    assert ours("step", milestones=[6, 9], gamma=0.2) == pytest.approx(theirs, rel=1e-12)


def test_warm_up_is_linear_and_then_the_cosine_runs_over_the_rest():
    found = ours("cosine", warmup_epochs=2)
    assert found[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    expected = [(1 + math.cos(math.pi * k / 50)) / 2 for k in range(50)]
    assert found[10:] == pytest.approx(expected, abs=1e-12)
    assert ours("cosine", steps=61)[-1] == pytest.approx(0, abs=1e-12)


def test_fractional_warm_up_stays_within_one():
    assert ours("constant", warmup_epochs=0.3)[:3] == pytest.approx([1 / 1.5, 1, 1])


def test_schedule_is_a_function_of_the_step_alone():
    multiplier = schedules.schedule("cosine", epochs=12, steps_per_epoch=5, warmup_epochs=1)
    steps = list(range(60))
    in_order = {step: multiplier(step) for step in steps}
    random.Random(0).shuffle(steps)
    assert {step: multiplier(step) for step in steps} == in_order


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "unknown schedule 'cosin'. Did you mean 'cosine'"),
        ("step", {}, "needs the option 'milestones'"),
        ("step", {"milestones": 5}, "milestones=5 must be a list"),
        ("cosine", {"final": -1}, "final=-1 must be greater than or equal to 0"),
        ("constant", {"gamma": 1}, "no option 'gamma'"),
        (
            "cosine",
            {"warmup_epochs": 13},
            "warmup_epochs=13 is not within training",
        ),
    ],
)
def test_bad_schedules_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        schedules.schedule(name, epochs=12, steps_per_epoch=5, **options)
