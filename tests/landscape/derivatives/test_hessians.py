"""Hessian products and Lanczos from gradients alone, against exact ones in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import normal, seeded
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import lsa
from lsa.landscape import Landscape, objectives
from lsa.landscape.derivatives import budget
from lsa.maths.spectra import eigenpairs
from lsa.runtime.errors import InputError


class Attentive(nn.Module):
    """A transformer of one block over 11 tokens; its attention is torch's fused kernel."""

    def __init__(self, activation: str = "gelu", recompute: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 16)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.activation, self.recompute = getattr(F, activation), recompute

    def block(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(self.activation(self.up(x)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        assert isinstance(x, Tensor)
        return self.head(x)


def made(steps: int = 0, **options: object) -> tuple[nn.Module, list[Tensor]]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Attentive(**options)  # pyright: ignore[reportArgumentType]
        ids = torch.randint(11, (12, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
    return model, list(ids.split(6))


def landscape(model: nn.Module, ids: list[Tensor], **options: object) -> Landscape:
    return Landscape(model, ids, objective=objectives.per_token(), **options)  # pyright: ignore


def truth(model: nn.Module, ids: list[Tensor]) -> tuple[Landscape, Tensor]:
    exact = landscape(model, ids, products="exact").double()
    return exact, exact.theta


def ends(exact: Landscape, at: Tensor) -> tuple[float, float]:
    """Both ends of the spectrum by exact products in float64."""
    rng = torch.Generator().manual_seed(0)
    start = eigenpairs.start_vector(at, rng, exact.gradient(at))
    found = eigenpairs.lanczos(exact.hessian(at), start, rng=rng, tol=1e-6)
    assert found.converged
    return found.smallest.values[0].item(), found.largest.values[0].item()


def nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without free memory."""
    monkeypatch.setattr(budget, "room", lambda device: 0)


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (0, {}),
        (60, {}),
        pytest.param(60, {"activation": "silu"}, marks=pytest.mark.full),
        pytest.param(60, {"recompute": True}, marks=pytest.mark.full),
    ],
    ids=["untrained", "trained", "silu", "checkpointed"],
)
def test_eigenvalues_lie_within_their_stated_error(steps, options, monkeypatch):
    model, ids = made(steps, **options)
    exact, at = truth(model, ids)
    values = ends(exact, at)
    found = landscape(model, ids, products="gradients")
    nothing_fits(monkeypatch)  # no exact product at the end
    options = {"density_probes": 0, "split": "no", "k": 2, "tol": 5e-3}
    result = lsa.lanczos(landscape=found, theta=found.theta, **options)
    for name, value in zip(("lambda_min", "lambda_max"), values, strict=True):
        error = result.metrics[f"{name}_residual"].value
        assert abs(result.metrics[name].value - value) <= error
    assert result.converged, result.notes
    assert any("their error was at most" in note for note in result.notes)
    monkeypatch.undo()
    found = landscape(model, ids, products="gradients")
    result = lsa.lanczos(landscape=found, theta=found.theta, **options)
    top = result.metrics["lambda_max"].value
    assert top == pytest.approx(values[1], rel=2e-6), "an exact product made it exact"


def test_in_bfloat16_the_error_is_told(monkeypatch):
    model, ids = made(60)
    exact, at = truth(model, ids)
    top = ends(exact, at)[1]
    own = objectives.per_token()

    def objective(network: nn.Module, batch: Tensor) -> lsa.Terms:
        with torch.autocast("cpu", torch.bfloat16):
            return own(network, batch)

    found = Landscape(model, ids, objective=objective, products="gradients")
    nothing_fits(monkeypatch)
    try:
        result = lsa.lanczos(
            landscape=found, theta=found.theta, density_probes=0, split="no", k=1, k_min=0, tol=0.2
        )
    except InputError as error:
        assert "low precision" in str(error)
        return
    value, error = (result.metrics[n].value for n in ("lambda_max", "lambda_max_residual"))
    assert abs(value - top) <= error < 0.5 * value


class TF32(torch.autograd.Function):
    """A linear layer whose factors have TF32's 10 bits of mantissa, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w, b)
        return F.linear(TF32.rounded(x), TF32.rounded(w), b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple:
        x, w, b = (t if t is None else TF32.rounded(t) for t in ctx.saved_tensors)
        g = TF32.rounded(gradients[0])
        rows = g.flatten(0, -2)
        return g @ w, rows.T @ x.flatten(0, -2), None if b is None else rows.sum(0)

    @staticmethod
    def rounded(t: Tensor) -> Tensor:
        return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_in_tf32_the_error_is_told(monkeypatch):
    model, ids = made(60)
    exact, at = truth(model, ids)
    top = ends(exact, at)[1]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            monkeypatch.setattr(
                module, "forward", lambda x, m=module: TF32.apply(x, m.weight, m.bias)
            )
    found = landscape(model, ids, products="gradients", copy=False)
    nothing_fits(monkeypatch)
    result = lsa.lanczos(
        landscape=found, theta=found.theta, density_probes=0, split="no", k=1, k_min=0, tol=0.05
    )
    value, error = (result.metrics[n].value for n in ("lambda_max", "lambda_max_residual"))
    assert 0 < abs(value - top) <= error < 0.1 * value


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of views of θ; torch's own
def test_a_compiled_network_is_measured_as_it_trains():
    model, ids = made(60)
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        calls.append(1)
        return graph.forward

    compiled: Any = torch.compile(model, backend=backend)
    found = landscape(compiled, ids, products="gradients", copy=False)
    exact, at = truth(model, ids)
    v = torch.randn(len(at), generator=torch.Generator().manual_seed(0))
    product = exact.hessian(at)(v.double())
    off = found.hessian(found.theta)(v).double() - product
    assert calls and off.norm() < 1e-3 * product.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of views of θ; torch's own
@pytest.mark.parametrize("products", ["exact", "gradients"])
def test_a_network_compiled_in_place_runs_so_for_differences_of_gradients_alone(products: str):
    """Compiled code has no second derivatives."""
    model, ids = made(60)
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        calls.append(1)
        return graph.forward

    model.compile(backend=backend)
    found = landscape(model, ids, products=products, copy=False)
    exact, at = truth(model, ids)
    v = torch.randn(len(at), generator=torch.Generator().manual_seed(0))
    product = exact.hessian(at)(v.double())
    off = found.hessian(found.theta)(v).double() - product
    assert off.norm() < 1e-3 * product.norm()
    found.losses(found.theta)
    assert bool(calls) == (products == "gradients")


def test_what_would_not_fit_is_by_gradients_and_says_so(monkeypatch):
    model, ids = made()
    at = landscape(model, ids)
    nothing_fits(monkeypatch)
    product = at.hessian(at.theta)
    v = torch.ones_like(at.theta)
    found = product(v)
    monkeypatch.undo()
    exact = landscape(model, ids, products="exact").hessian(at.theta)(v)
    assert (found - exact).norm() < 1e-3 * exact.norm()
    assert "takes over 0 GB, half of the memory that is free" in at.remarks["hessian"]


def test_kinks_at_theta_are_refused_and_never_printed_without_the_flag(monkeypatch):
    """A ReLU network whose biases are zero and half of whose inputs are: kinks lie at θ."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        model.append(nn.Linear(32, 3))
        for layer in model[::2]:
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        x, y = torch.randn(40, 6), torch.randint(3, (40,))
        x[::2] = 0
    exact = Landscape(model, x, y, products="exact")
    top = lsa.lanczos(landscape=exact, theta=exact.theta, density_probes=0, split="no", k=1)
    found = Landscape(model, x, y, products="gradients")
    nothing_fits(monkeypatch)
    try:
        result = lsa.lanczos(landscape=found, theta=found.theta, density_probes=0, split="no", k=1)
    except InputError as error:
        assert "kinks" in str(error)
        return
    true, value = (r.metrics["lambda_max"].value for r in (top, result))
    assert not result.converged or abs(true - value) <= result.metrics["lambda_max_residual"].value


def test_an_unknown_way_is_refused():
    model, ids = made()
    with pytest.raises(InputError, match="products='fast'; choose auto, exact or gradients"):
        landscape(model, ids, products="fast")


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gradients_added_up_where_they_arise_are_those_of_autograd(parts, options):
    model, ids = made(**options)
    ids = list(torch.cat(ids).split(12 // parts))
    at = landscape(model, ids, products="gradients")
    losses = [
        F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction="sum")
        for x in ids
    ]
    loss = torch.stack(losses).sum() / (torch.cat(ids)[:, 1:].numel())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])
    value, gradient = at.loss_and_gradient(at.theta)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    assert (gradient - expected).norm() < 1e-6 * expected.norm()
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_leaves_what_lies_outside_of_theta_alone():
    model, ids = made()
    model.get_parameter("head.weight").grad = torch.ones(11, 16)
    at = landscape(model, ids, products="gradients", copy=False, parameters="qkv.*")
    at.gradient(at.theta)
    assert torch.equal(model.get_parameter("head.weight").grad, torch.ones(11, 16))
    assert model.get_parameter("qkv.weight").grad is None


class Squared(torch.autograd.Function):
    """x² with a right gradient, whose own derivative misses a term, as of a kernel by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * 2 * x.detach()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangents[0] * 2 * x


class OfKernel(nn.Sequential):
    """A layer of such a kernel."""

    def __init__(self, function: Any) -> None:
        super().__init__(nn.Linear(4, 6), nn.Linear(6, 3))
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self[1](self.function(self[0](input)))


def test_exact_products_that_differences_belie_are_not_used():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        kernel, plain = (OfKernel(f).double() for f in (Squared.apply, torch.square))
        kernel.load_state_dict(plain.state_dict())
        x, y = torch.randn(20, 4).double(), torch.arange(20) % 3
    with pytest.raises(InputError, match="Hessian product is not the derivative of the gradient"):
        lsa.lanczos(Landscape(kernel, x, y), k=1, density_probes=0)
    options = {"k": 1, "density_probes": 0, "split": "no"}
    found = lsa.lanczos(Landscape(kernel, x, y, products="gradients"), **options)
    exact = lsa.lanczos(Landscape(plain, x, y), **options)
    wanted = exact["lambda_max"]
    assert found["lambda_max"].value == pytest.approx(wanted.value, rel=1e-4)
    assert found["lambda_max"].errors["data"] == pytest.approx(wanted.errors["data"], rel=1e-3)
    assert any("exact second derivatives of this network are" in note for note in found.notes)


class FixedPoint(nn.Module):
    """A hook puts in the gradient of a fixed point, of which forward mode knows nothing.

    Args:
        unrolled: Differentiate the iteration itself, which is the truth.
    """

    def __init__(self, unrolled: bool = False) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.unrolled = unrolled

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.inner(z) + x)

    def solved(self, x: Tensor) -> Tensor:
        z = x
        for _ in range(60):
            z = self.step(z, x)
        return z

    def forward(self, x: Tensor) -> Tensor:
        if self.unrolled:
            return self.last(self.solved(x))
        with torch.no_grad():
            z = self.solved(x)
        if not torch.is_grad_enabled():
            return self.last(z)
        start = z.detach().requires_grad_()
        made = self.step(start, x)

        def backward(g: Tensor) -> Tensor:
            total = g
            for _ in range(60):
                total = g + torch.autograd.grad(made, start, total, retain_graph=True)[0]
            return total

        z = made.clone()
        z.register_hook(backward)
        return self.last(z)


def test_slopes_come_from_single_gradients_where_a_hook_solves_for_the_gradient():
    x, y = normal(12, 4), torch.arange(12) % 3
    landscape = Landscape(seeded(FixedPoint), x, y, products="gradients")
    truth = Landscape(seeded(lambda: FixedPoint(unrolled=True)), x, y)
    theta = truth.theta
    u = torch.linspace(-1, 1, len(theta), dtype=theta.dtype)
    torch.testing.assert_close(landscape.slopes(theta, u), truth.slopes(theta, u))
    torch.testing.assert_close(landscape.covariance(theta)(u), truth.covariance(theta)(u))
    with pytest.raises(InputError, match="there is no Gauss–Newton part"):
        landscape.gauss_newton(theta)(u)

    found = lsa.lanczos(landscape, k=1, k_min=0, density_probes=0)
    wanted = lsa.lanczos(truth, k=1, k_min=0, density_probes=0)["lambda_max"]
    assert found["lambda_max"].value == pytest.approx(wanted.value, rel=1e-5)
    assert found["lambda_max"].errors["data"] == pytest.approx(wanted.errors["data"], rel=1e-3)
    rows = torch.cat([*landscape.sample_gradients(theta)])
    torch.testing.assert_close(rows @ u, truth.slopes(theta, u))


@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_half_precision_is_no_wrong_derivative(seed: int):
    """Of ⟨w, Jv⟩, whose error reaches 2.6 % of the usual size in deep networks."""

    def make() -> nn.Module:
        inner = [nn.Sequential(nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(5)]
        return nn.Sequential(nn.Linear(20, 32), *inner, nn.Linear(32, 5))

    x, y = (normal(64, 20) + 2 + seed).bfloat16(), torch.arange(64) % 5
    landscape = Landscape(seeded(make).bfloat16(), x, y)
    u = torch.ones_like(landscape.theta)
    assert landscape.gauss_newton(landscape.theta)(u) @ u > 0
    assert (landscape.covariance(landscape.theta)(u) @ u) > 0


class MeansByProduct(nn.Module):
    """Forward mode of torch's product over indices is wrong (torch 2.14)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([0, 0, 1, 2, 2, 2]).expand(len(x), 6)
        ones = torch.ones(len(x), 3, dtype=x.dtype)
        return self.last(ones.scatter_reduce(1, index, torch.tanh(self.first(x)), "prod"))


def test_a_forward_mode_that_is_wrong_is_not_used():
    x, y = normal(10, 4), torch.arange(10) % 3
    landscape = Landscape(seeded(MeansByProduct), x, y)
    theta = landscape.theta
    found = lsa.lanczos(landscape, k=1, k_min=0, density_probes=0)
    assert any("slopes of samples take a backward pass for each" in note for note in found.notes)
    u = torch.linspace(-1, 1, len(theta), dtype=theta.dtype)
    rows = torch.cat([*landscape.sample_gradients(theta)])
    torch.testing.assert_close(landscape.slopes(theta, u), rows @ u)
    curved = landscape.gauss_newton_curvatures(theta, u).mean()
    torch.testing.assert_close(curved, u @ landscape.gauss_newton(theta)(u))
