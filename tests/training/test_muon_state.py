"""Muon's preconditioner against its own steps, dense matrices and the iteration of both rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lsa.runtime.errors import InputError
from lsa.training import muon_state, optimizers, stability
from lsa.training.preconditioners import Preconditioner
from lsa.training.stability import OptimizerState

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

SHAPES = ((3, 2), (3,), (3, 5), (7, 3), (2, 2, 3, 1), (2, 7))  # hidden: wide, tall, a convolution
HIDDEN = {2: (3, 5), 3: (7, 3), 4: (2, 6)}  # place → as a matrix


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(steps: int, frozen: tuple[int, ...] = (), **options: Any) -> tuple[list, Any]:
    """A network's parameters and its Muon after steps with random gradients."""
    parameters = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    for i in frozen:
        parameters[i].requires_grad_(False)
    optimizer = optimizers.build("Muon", parameters, **options)
    for k in range(steps):
        step(parameters, optimizer, normal(dimension(parameters), seed=10 + k))
    return parameters, optimizer


def trainable(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def dimension(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in trainable(parameters))


def flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in trainable(parameters)])


def step(parameters: list[nn.Parameter], optimizer: Any, g: Tensor) -> None:
    own = trainable(parameters)
    for p, part in zip(own, g.split([p.numel() for p in own]), strict=True):
        p.grad = part.view(p.shape).clone()
    optimizer.step()


def kept(parameters: list[nn.Parameter], optimizer: Any) -> OptimizerState:
    return stability.read(optimizer, trainable(parameters), 16)


def thresholds(optimizer: Any) -> tuple[float, float]:
    """That of the hidden weights and AdamW's, by the formulas of both."""
    own, rest = optimizer.param_groups
    beta, ahead = own["momentum"], 1 + 2 * own["momentum"] if own["nesterov"] else 1
    first = rest["betas"][0]
    return (
        (2 - own["lr"] * own["weight_decay"]) * (1 + beta) / ((1 - beta) * ahead * own["lr"]),
        (2 - rest["lr"] * rest["weight_decay"]) * (1 + first) / ((1 - first) * rest["lr"]),
    )


def inverse(found: OptimizerState, theta: Tensor) -> Tensor:
    """P⁻¹ as a matrix."""
    P = found.preconditioner(theta)
    assert P is not None
    root = torch.stack([P.inverse_root(e) for e in torch.eye(len(theta)).double()], dim=1)
    torch.testing.assert_close(root, root.T, rtol=1e-10, atol=1e-12)
    assert torch.linalg.eigvalsh(root)[0] > 0
    torch.testing.assert_close(
        torch.linalg.inv(root @ root).diagonal(), P.diagonal, rtol=1e-8, atol=0
    )
    return root @ root


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("frozen", [(), (1, 3)])
def test_the_next_step_is_that_of_the_real_optimizer(nesterov, frozen):
    for steps in (0, 1, 4):
        parameters, optimizer = stepped(steps, frozen, lr=0.03, nesterov=nesterov)
        found, before = kept(parameters, optimizer), flat(parameters)
        g = normal(len(before), seed=5)
        u = found.update(before, g)
        assert torch.equal(u, found.update(before, g)), "the state was changed"
        step(parameters, optimizer, g)
        torch.testing.assert_close(u, flat(parameters) - before, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("frozen", [(), (0, 3)])
def test_the_last_step_is_the_rate_times_the_average_over_the_preconditioner(frozen):
    """−η P⁻¹m of both rules at once, m the momentum or the first moment, P⁻¹ as one matrix."""
    options = {"lr": 0.03, "adamw_lr": 0.004, "weight_decay": 0.0, "nesterov": False}
    parameters, optimizer = stepped(4, frozen, **options)
    before = flat(stepped(3, frozen, **options)[0])
    found = kept(parameters, optimizer)
    m, rate, exact = [], [], []
    muon, adamw = thresholds(optimizer)
    for i, p in enumerate(parameters):
        if not p.requires_grad:
            continue
        state = optimizer.state[p]
        m.append(state["momentum_buffer" if i in HIDDEN else "exp_avg"].reshape(-1))
        rate.append(torch.full_like(m[-1], 0.03 * muon if i in HIDDEN else 0.004 * adamw))
        exact.append(torch.full_like(m[-1], i not in HIDDEN, dtype=torch.bool))
    average, rates, diagonal = torch.cat(m), torch.cat(rate), torch.cat(exact)
    expected = -rates * (inverse(found, before) @ average)
    last = flat(parameters) - before
    torch.testing.assert_close(last[diagonal], expected[diagonal], rtol=1e-9, atol=1e-14)
    # Newton–Schulz itself runs in bfloat16: five steps of three roundings of 2⁻⁹.
    error = (last - expected)[~diagonal].norm() / expected[~diagonal].norm()
    assert error < 5 * 3 * 2**-9


def test_the_preconditioner_is_roughly_the_root_of_the_momentum_squared():
    """Of UVᵀ it would be exactly (MMᵀ)^½: singular values 0.5 to 1.5 bound the two apart."""
    parameters, optimizer = stepped(3)
    found, theta = kept(parameters, optimizer), flat(parameters)
    product, begin = inverse(found, theta) * thresholds(optimizer)[0], 0
    for i, p in enumerate(parameters):
        part = slice(begin, begin := begin + p.numel())
        if i not in HIDDEN:
            continue
        rows, columns = HIDDEN[i]
        M = optimizer.state[p]["momentum_buffer"].reshape(rows, columns)
        small, size = (M @ M.T, columns) if rows <= columns else (M.T @ M, rows)
        values, U = torch.linalg.eigh(small)
        root = (U * values.sqrt()) @ U.T / max(1, rows / columns) ** 0.5
        identity = torch.eye(size, dtype=torch.float64)
        P = torch.kron(root, identity) if rows <= columns else torch.kron(identity, root)
        gains = torch.linalg.eigvals(product[part, part] @ P).real
        assert 0.5 < gains.min() and gains.max() < 1.5, i


def radius(optimizer: Any, P_inverse: Tensor, H: Tensor, hidden: Tensor) -> float:
    """Spectral radius of (θ, m) → one step of both rules at rest, P⁻¹ of each by its own rate.

    m ← βm + (1−β)g, θ ← (1−ηλ)θ − ηP⁻¹u with u = m, or (1−β)g + βm where Muon looks ahead.
    """
    own, rest = optimizer.param_groups
    muon, adamw = hidden.double(), 1 - hidden.double()
    beta = muon * own["momentum"] + adamw * rest["betas"][0]
    eta = muon * own["lr"] + adamw * rest["lr"]
    by_g = (1 - beta) * (1 + muon * own["nesterov"] * beta)
    by_m = torch.where(hidden & own["nesterov"], beta**2, beta)
    back, scale = torch.diag(1 - eta * own["weight_decay"]), torch.diag(eta)
    up = torch.cat([back - scale @ P_inverse @ torch.diag(by_g) @ H, -scale @ P_inverse * by_m], 1)
    down = torch.cat([torch.diag(1 - beta) @ H, torch.diag(beta)], 1)
    return torch.linalg.eigvals(torch.cat([up, down])).abs().max().item()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("adamw_lr", [1e-3, 1.0])
def test_both_rules_together_turn_unstable_at_one_threshold(nesterov, weight_decay, adamw_lr):
    """On a quadratic that couples all parameters, where two thresholds would be read apart."""
    options = {"lr": 0.1, "adamw_lr": adamw_lr, "nesterov": nesterov, "weight_decay": weight_decay}
    parameters, optimizer = stepped(3, **options)
    found, d = kept(parameters, optimizer), dimension(parameters)
    A, common = normal(d, d + 3, seed=8), inverse(found, flat(parameters))
    sharpness = torch.linalg.eigvals(common @ A @ A.T).real.max().item()
    assert found.threshold is not None and found.threshold[0] == 1
    H = A @ A.T / sharpness
    hidden = torch.cat([torch.full((p.numel(),), i in HIDDEN) for i, p in enumerate(parameters)])
    muon, adamw = thresholds(optimizer)
    each = torch.where(hidden, muon, adamw).double()[:, None] * common  # each one's own P⁻¹ again
    assert radius(optimizer, each, 0.999 * H, hidden) < 1
    assert radius(optimizer, each, 1.001 * H, hidden) > 1


def test_before_the_first_step_there_is_none():
    parameters, optimizer = stepped(0)
    found = kept(parameters, optimizer)
    assert found.preconditioner(flat(parameters)) is None and "not stepped" in found.reason
    assert found.threshold is not None


def test_a_group_with_a_rate_of_zero_stands_still():
    parameters, optimizer = stepped(2, adamw_lr=0.0)
    P = kept(parameters, optimizer).preconditioner(theta := flat(parameters))
    assert P is not None
    moved = P.inverse_root(torch.ones_like(theta)).split([p.numel() for p in parameters])
    assert [i for i, part in enumerate(moved) if part.any()] == list(HIDDEN)


def test_a_momentum_of_zero_is_refused_in_one_line():
    parameters, optimizer = stepped(2)
    optimizer.state[parameters[3]]["momentum_buffer"].zero_()
    with pytest.raises(InputError, match="momentum of Muon is zero"):
        kept(parameters, optimizer).preconditioner(flat(parameters))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("shape", [(3, 5), (7, 3)])
def test_the_last_step_of_torchs_own_muon_is_that_of_its_rule(shape, adjust):
    p = nn.Parameter(normal(*shape))
    optimizer = torch.optim.Muon(
        [p], lr=0.03, weight_decay=0.0, nesterov=False, adjust_lr_fn=adjust
    )
    for k in range(3):
        before, p.grad = p.detach().clone(), normal(*shape, seed=10 + k)
        optimizer.step()
    rule = muon_state.torch_muon(p, optimizer.param_groups[0], optimizer.state[p])
    assert isinstance(rule.P, Preconditioner) and rule.threshold == pytest.approx(2 * 39 / 0.03)
    M = optimizer.state[p]["momentum_buffer"].reshape(-1)
    expected = -0.03 * rule.P.inverse_root(rule.P.inverse_root(M))
    error = ((p.detach() - before).reshape(-1) - expected).norm() / expected.norm()
    assert error < 5 * 3 * 2**-8  # five steps of three roundings in bfloat16, each by 2⁻⁸


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
@pytest.mark.parametrize(
    "package",
    [
        "lsa",
        pytest.param(
            "torch",
            marks=pytest.mark.skipif(
                not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9"
            ),
        ),
        pytest.param("pytorch_optimizer", marks=(pytest.mark.models, pytest.mark.full)),
    ],
)
def test_real_steps_below_the_threshold_converge_and_above_it_diverge(
    package, nesterov, weight_decay
):
    """A slope on the left half of a matrix holds P; the right half is a small quadratic.

    Newton–Schulz runs in bfloat16, so the threshold is as sharp as that.
    """
    options = {"lr": 0.1, "nesterov": nesterov, "weight_decay": weight_decay}
    turn = torch.linalg.qr(normal(2, 2)).Q
    slope = turn @ torch.diag(torch.tensor([1.0, 0.7]).double()) @ turn.T
    small = 1e-12 * normal(2, 2, seed=2)

    def run(curvature: float) -> tuple[float, OptimizerState]:
        W = nn.Parameter(torch.cat([0 * slope, small], 1))
        around = [nn.Parameter(normal(2, 2)), W, nn.Parameter(normal(3, 2))]
        optimizer: Any
        if package == "lsa":
            optimizer = optimizers.build("Muon", around, **options)
        elif package == "torch":
            optimizer = torch.optim.Muon([W], **options)
        else:
            groups = [{"params": [W], "use_muon": True}]
            optimizer = pytest.importorskip(package).Muon(groups, **options)
        for i in range(900):
            if i == 300:  # the average of the slope has settled
                with torch.no_grad():
                    W[:, 2:] = small
            h = curvature if i >= 300 else 0.0
            W.grad = torch.cat([slope, h * W.detach()[:, 2:]], 1)
            optimizer.step()
        return W.detach()[:, 2:].norm().item(), stability.read(optimizer, [W])

    _, found = run(0.0)
    P = found.preconditioner(torch.zeros(8).double())
    assert P is not None and found.threshold is not None
    root = torch.stack([P.inverse_root(e) for e in torch.eye(8).double()])
    right = torch.tensor([2, 3, 6, 7])
    sharpness = torch.linalg.eigvalsh((root @ root)[right][:, right])[-1].item()  # at h = 1
    edge = found.threshold[0] / sharpness
    assert run(0.95 * edge)[0] < 1e-12
    assert run(1.05 * edge)[0] > 1e-4


@pytest.mark.models
@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_adjusted_lr": True},
        {"ns_coeffs": "polar_express", "ns_steps": 8, "weight_decay": 0.5},
        {"ns_method": "gram_newton_schulz"},
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), (7, 3), (4, 2, 2)])
def test_the_last_step_of_muon_of_a_collection_is_that_of_its_rule(shape, options):
    """Matrices by Newton–Schulz, and beside them a group that AdamW steps."""
    collection = pytest.importorskip("pytorch_optimizer")
    p, q = nn.Parameter(normal(*shape)), nn.Parameter(normal(6))
    groups = [{"params": [p], "use_muon": True}, {"params": [q], "use_muon": False}]
    optimizer = collection.Muon(groups, lr=0.03, adamw_lr=0.02, nesterov=False, **options)
    for k in range(3):
        for each in (p, q):
            each.grad = normal(*each.shape, seed=10 + k)
        before = p.detach().clone(), q.detach().clone()
        optimizer.step()
    state = stability.read(optimizer, [p, q])
    P = state.preconditioner(torch.zeros(p.numel() + 6).double())
    assert P is not None and state.threshold is not None and state.threshold[0] == 1
    kept = 1 - 0.03 * options.get("weight_decay", 0.0)
    steps = torch.cat([(p.detach() - kept * before[0]).flatten(), q.detach() - before[1]])
    averages = optimizer.state[p]["momentum_buffer"].flatten(), optimizer.state[q]["exp_avg"]
    expected = -P.inverse_root(P.inverse_root(torch.cat(averages)))  # the thresholds are in P
    n, rounding = p.numel(), options.get("ns_steps", 5) * 3 * 2**-8  # as for torch's own
    edges = (slice(n), (1 + kept) * 1.95 / 0.05, rounding), (slice(n, None), 2 * 1.9 / 0.1, 1e-9)
    for part, edge, close in edges:  # each times its rate
        assert (steps[part] - edge * expected[part]).norm() < close * steps[part].norm()
