"""Networks that once gave a wrong number without a word, or could: refused, noted or right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import rng
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

import lsa
from lsa.runtime.errors import InputError
from models.float32 import X, Y, dense, loader, mlp, notes, seeded

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


class HoldsAView(nn.Module):
    """A weight twice, the second time as a view that was made once."""

    def __init__(self, data: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.turned = self.a.weight.data.t() if data else self.a.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) @ self.turned)


class TwoOfOne(nn.Module):
    """Two parameters in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = nn.Parameter(self.a.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Limited(nn.Linear):
    """A limit on the norm of its rows, kept in the forward pass, as EEG networks have it."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.renorm_(2, 0, 0.3)
        return super().forward(x)


class LimitedWithoutGradients(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.renorm_(2, 0, 0.3)
        return super().forward(x)


class Listed(nn.Module):
    """A trainable tensor in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.more = nn.Linear(4, 5), [torch.randn(5, 3, generator=rng(3)).requires_grad_()]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) @ self.more[0]


class Stateful(nn.Module):
    """A recurrent network that goes on from its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        state = self.state if self.state is not None and self.state.shape[1] == len(x) else None
        h, last = self.cells(x[:, None], state)
        self.state = last.detach()
        return self.out(h[:, -1])


def replaced_layer() -> nn.Module:
    model: Any = mlp()
    first = model[0]
    first.forward = lambda x: F.linear(x, 2 * first.weight, first.bias)
    return model


def replaced_whole() -> nn.Module:
    model: Any = mlp()
    first, middle, last = model
    model.forward = lambda x: last(middle(first(x)))
    return model


def hooked() -> nn.Module:
    model: Any = mlp()
    model[2].register_forward_pre_hook(lambda module, given: (given[0] * model[0].weight.sum(),))
    return model


@pytest.mark.parametrize("batches", [False, True], ids=["tensors", "batches"])
@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda: HoldsAView(data=False), "'turned' is a view of a parameter"),
        (lambda: HoldsAView(data=True), "'turned' is a view of a parameter"),
        (TwoOfOne, "'a.weight' and 'b.weight' are two tensors in one memory"),
        (lambda: nn.Sequential(Limited(4, 5), nn.Linear(5, 3)), "writes into its parameter"),
        (
            lambda: nn.Sequential(LimitedWithoutGradients(4, 5), nn.Linear(5, 3)),
            "writes into its parameter '0.weight'",
        ),
        (Listed, "depends on trainable tensors"),
        (replaced_layer, "depends on trainable tensors"),
        (replaced_whole, "depends on trainable tensors"),
        (hooked, "depends on trainable tensors"),
        (Stateful, "two passes over the same samples give"),
    ],
    ids=[
        "view", "view of data", "one memory", "norm limit", "norm limit without gradients",
        "plain list", "layer replaced", "forward replaced", "hook", "state",
    ],
)  # fmt: skip
def test_a_network_that_is_no_function_of_theta_is_refused_in_one_line(build, line, batches):
    model = seeded(build)
    with pytest.raises(InputError, match=line) as refused:
        notes(lsa.Landscape(model, loader()) if batches else lsa.Landscape(model, X, Y))
    assert "\n" not in str(refused.value)


class Merges(nn.Module):
    """Low-rank adapters that are added to the weight in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(4, 3)
        self.a, self.b = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(3, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merges:
        if mode == self.merged:
            self.w.weight.data += (-1 if mode else 1) * (self.b.data @ self.a.data)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x) if self.merged else self.w(x) + x @ self.a.T @ self.b.T


class Keeps(nn.Module):
    """A weight that is computed once in evaluation mode, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.kept = nn.Linear(4, 3), None

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.kept is None:
            self.kept = self.a.weight.softmax(1)
        return F.linear(x, self.kept.to(x), self.a.bias)


@pytest.mark.parametrize("batches", [False, True], ids=["tensors", "batches"])
@pytest.mark.parametrize(
    ("build", "line"), [(lambda: Merges().eval(), "14 of 29 "), (Keeps, "12 of 15 ")]
)
def test_parameters_without_influence_are_named(build, line, batches):
    model = seeded(build)
    landscape = lsa.Landscape(model, loader()) if batches else lsa.Landscape(model, X, Y)
    assert f"the loss does not depend on {line}parameters (a" in notes(landscape)


def test_experts_that_other_samples_take_are_not_without_influence():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.ModuleList(nn.Linear(4, 3) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            out = x.new_zeros(len(x), 3)
            for i, expert in enumerate(self.each):
                (mine,) = torch.where(x[:, 0].mul(97).long() % 6 == i)
                if len(mine):
                    out = out.index_add(0, mine, expert(x[mine]))
            return out

    assert notes(lsa.Landscape(seeded(Experts), X.abs(), Y)) == ""


def test_hooks_that_compute_a_weight_anew_are_no_views():
    model: Any = mlp()
    with torch.random.fork_rng():
        nn.utils.spectral_norm(model[0])
    assert notes(lsa.Landscape(model, X, Y)) == ""
    pruned: Any = mlp()
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    assert notes(lsa.Landscape(pruned, X, Y)) == ""


def test_parameters_of_two_precisions():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x.to(self.a.weight))).double())

    model = seeded(Mixed)
    landscape = lsa.Landscape(model, X, Y)
    fine = copy.deepcopy(model).double()
    g, H = dense(model, lambda p: F.cross_entropy(functional_call(fine, p, X.double()), Y))
    theta, v = landscape.theta, torch.linspace(-1, 1, landscape.dimension).double()
    torch.testing.assert_close(landscape.gradient(theta), g, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(landscape.hessian(theta)(v), H @ v, rtol=1e-5, atol=1e-6)


def test_a_network_that_calls_torch_func_itself_has_per_sample_gradients():
    class Slope(nn.Module):
        """A field as the gradient of a potential."""

        def __init__(self) -> None:
            super().__init__()
            self.potential = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(torch.func.grad(lambda z: self.potential(z).sum()))(x)

    model = seeded(Slope)
    landscape = lsa.Landscape(model, X, X.roll(1, 0), F.mse_loss)

    def field(p: dict, x: Tensor) -> Tensor:
        W, b, u = (p[f"potential.{name}"] for name in ("0.weight", "0.bias", "2.weight"))
        return ((1 - torch.tanh(x @ W.T + b).square()) * u) @ W

    def sample(i: int) -> Tensor:
        x, y = X[i : i + 1].double(), X.roll(1, 0)[i : i + 1].double()
        return dense(model, lambda p: F.mse_loss(field(p, x), y))[0]

    rows = torch.stack([sample(i) for i in range(24)])
    theta, v = landscape.theta, torch.linspace(-1, 1, landscape.dimension)
    C = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / 24
    torch.testing.assert_close(
        landscape.covariance(theta)(v).double(), C @ v.double(), rtol=1e-4, atol=1e-6
    )


class Centres(nn.Module):
    """Radial functions around centres, by distances that have no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(6, 4, generator=rng(7)))  # on no sample
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.exp(-torch.cdist(x, self.centres.to(x)).square() / 4))


def test_an_operation_without_forward_mode_has_curvatures_of_samples():
    model = seeded(Centres)
    landscape = lsa.Landscape(model, X, Y)
    fine = copy.deepcopy(model).double()

    def distances(p: dict[str, Tensor]) -> Tensor:
        squares = (X.double()[:, None] - p["centres"]).square().sum(2)
        return torch.exp(-squares / 4) @ p["out.weight"].T + p["out.bias"]

    g, H = dense(fine, lambda p: F.cross_entropy(distances(p), Y))
    theta, v = landscape.theta, torch.linspace(-1, 1, landscape.dimension)
    torch.testing.assert_close(landscape.gradient(theta).double(), g, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        landscape.hessian(theta)(v).double(), H @ v.double(), rtol=1e-4, atol=1e-6
    )
    curved = landscape.gauss_newton_curvatures(theta, v)
    torch.testing.assert_close(
        curved.mean(), v @ landscape.gauss_newton(theta)(v), rtol=1e-4, atol=1e-6
    )
