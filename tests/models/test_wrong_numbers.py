"""What once gave, or could give, a wrong number without a word: refused, noted or right."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import lsa
from lsa.landscape import consistency
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X, Y = torch.randn(24, 4, generator=rng(1)), torch.arange(24) % 3


def seeded(build: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build()


def mlp(outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)))


def loader(y: Tensor = Y, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(X, y), **{"batch_size": 8, **options})


def notes(landscape: lsa.Landscape) -> str:
    return "; ".join(consistency.notes(landscape, landscape.theta))


def dense(model: nn.Module, value: Any) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian in float64; `value` takes the network's parameters by name."""
    named = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]

    def of(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        return value({name: part.view_as(p) for (name, p), part in parts})

    at = torch.cat([p.reshape(-1) for p in named.values()])
    derivatives: Any = torch.autograd.functional
    return derivatives.jacobian(of, at), derivatives.hessian(of, at)


# --- the network ----------------------------------------------------------------------------------


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
@pytest.mark.parametrize(("build", "line"), [(Merges, "14 of 29 "), (Keeps, "12 of 15 ")])
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


# --- losses, terms and batches --------------------------------------------------------------------


def masked(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs.view(-1, 2, 3)[y >= 0], y[y >= 0])


def by_class(outputs: Tensor, y: Tensor) -> Tensor:
    w = torch.tensor([1.0, 1.0, 6.0]).to(outputs)[y]
    return (F.cross_entropy(outputs, y, reduction="none") * w).sum() / w.sum()


@pytest.mark.parametrize("case", ["masked", "weighted"])
def test_a_weighing_that_only_later_batches_show_is_refused(case):
    """Each batch alone has a plain mean: labels are sorted."""
    if case == "masked":
        model, loss, y = mlp(6), masked, torch.stack([Y, (Y + 1) % 3], 1)
        y[12:, 1] = -1
    else:
        model, loss, y = mlp(), by_class, Y.sort().values
    with pytest.raises(InputError, match="the loss is no mean over samples"):
        notes(lsa.Landscape(model, loader(y, batch_size=4), loss=loss))


def test_a_loss_that_holds_weights_of_all_samples_is_refused():
    loss = nn.BCEWithLogitsLoss(weight=torch.rand(24, 1, generator=rng(3)))
    with pytest.raises(InputError, match="the loss of 4 sample"):
        notes(lsa.Landscape(mlp(1), X, (Y[:, None] > 0).float(), loss))


def terms(kind: str, model: nn.Module, x: Tensor, y: Tensor) -> lsa.Terms:
    outputs = model(x)
    each = F.cross_entropy(outputs, y, reduction="none")
    weights = outputs.softmax(1).amax(1)
    return {
        "weight": lsa.Terms((weights * each).sum(), weights.sum()),
        "weights": lsa.Terms((weights * each).sum(), len(y), weights * each, weights),
        "total": lsa.Terms(each.sum().detach().clone(), len(y), each),
        "samples": lsa.Terms(each.sum(), len(y), each.detach()),
        "part": lsa.Terms(each[1:].sum() + each[0].detach(), len(y), each),
        "mean": lsa.Terms(each.mean(), len(y)),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("weight", "Terms.weight depends on the network's parameters"),
        ("weights", "Terms.weight depends on the network's parameters"),
        ("total", "Terms.total is detached from the network"),
        ("samples", "gradient of Terms.total is not that of the samples"),
        ("part", "gradient of Terms.total is not that of the samples"),
        ("mean", "so it is a mean, but Terms.weight is 8"),
    ],
)
def test_terms_that_do_not_fit_together_are_refused(kind, line):
    landscape = lsa.Landscape(
        mlp(), loader(), objective=lambda model, batch: terms(kind, model, *batch)
    )
    with pytest.raises(InputError, match=line):
        notes(landscape)


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(h - h.mean(0))


def test_samples_that_a_layer_mixes_are_noted_in_batches():
    model = seeded(Mixes)
    landscape = lsa.Landscape(model, loader())
    assert "the loss of a sample depends on the others of its batch" in notes(landscape)
    x = X.double().split(8)
    g, _ = dense(
        model,
        lambda p: (
            sum(
                F.cross_entropy(functional_call(model.double(), p, part), y)
                for part, y in zip(x, Y.split(8), strict=True)
            )
            / 3
        ),
    )
    torch.testing.assert_close(
        landscape.gradient(landscape.theta).double(), g, rtol=1e-4, atol=1e-6
    )
    assert notes(lsa.Landscape(mlp(), loader())) == ""


class Scaled:
    """Batches with a number that is another one at every reading, of Python's generator."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from (
            {"x": x, "y": y, "scale": random.random()}
            for x, y in zip(X.split(8), Y.split(8), strict=True)
        )


def test_numbers_in_batches_that_change_are_refused():
    def objective(model: nn.Module, batch: dict[str, Any]) -> lsa.Terms:
        each = batch["scale"] * F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return lsa.Terms(each.sum(), len(each), each)

    state = random.getstate()
    try:
        with pytest.raises(InputError, match="batch 0 has other content"):
            notes(lsa.Landscape(mlp(), Scaled(), objective=objective))
    finally:
        random.setstate(state)


def test_what_a_loader_leaves_out_or_repeats_is_noted():
    data = TensorDataset(X, Y)
    assert "3 of 24 samples are no part of L" in notes(
        lsa.Landscape(mlp(), loader(batch_size=7, drop_last=True))
    )
    repeated = DataLoader(data, batch_size=8, sampler=RandomSampler(data, replacement=True))
    assert "draws samples with replacement" in notes(lsa.Landscape(mlp(), repeated))
    assert notes(lsa.Landscape(mlp(), loader(batch_size=7, shuffle=True))) == ""


def test_a_loss_of_batches_that_is_no_sum_over_their_parts_is_noted():
    """Labels are sorted: within the first batch all weigh alike."""

    def per_batch(loss: Any) -> str:
        def objective(model: nn.Module, batch: Any) -> lsa.Terms:
            return lsa.Terms(len(batch[1]) * loss(model(batch[0]), batch[1]), len(batch[1]))

        return notes(lsa.Landscape(mlp(), loader(Y.sort().values), objective=objective))

    weights = torch.tensor([1.0, 5.0, 20.0])
    assert "depends on how they are cut" in per_batch(
        lambda o, y: F.cross_entropy(o, y, weights.to(o))
    )
    assert "depends on how they are cut" not in per_batch(F.cross_entropy)


@pytest.mark.parametrize("kind", ["no sample", "no label"])
def test_a_batch_that_has_no_loss_is_named(kind):
    def objective(model: nn.Module, batch: Any) -> lsa.Terms:
        mean = F.cross_entropy(model(batch[0]), batch[1], ignore_index=2)
        return lsa.Terms(len(batch[1]) * mean, len(batch[1]))

    if kind == "no label":
        landscape = lsa.Landscape(mlp(), loader(Y.sort().values), objective=objective)
        line = "the loss of batch 2 is not finite"
    else:
        landscape = lsa.Landscape(mlp(), [(X[:12], Y[:12]), (X[:0], Y[:0]), (X[12:], Y[12:])])
        line = "batch 1 has no samples; leave it out"
    with pytest.raises(InputError, match=line):
        notes(landscape)


@pytest.mark.parametrize("given", ["a part", "another tensor", "one made from another", "all"])
def test_outputs_that_the_loss_is_not_computed_from_have_no_gauss_newton_part(given):
    """The loss is of classes and of two numbers, each by outputs of its own."""

    def whole(outputs: Tensor, y: Tensor) -> Tensor:
        numbers = outputs[:, 3:].square().sum(1)
        return F.cross_entropy(outputs[:, :3], y, reduction="none") + numbers / 2

    def objective(model: nn.Module, batch: Any) -> lsa.Terms:
        outputs = model(batch[0])
        classes, numbers = outputs[:, :3], outputs[:, 3:]
        twice = (2 * classes).tanh()
        each = F.cross_entropy(classes, batch[1], reduction="none") + numbers.square().sum(1) / 2
        if given == "one made from another":
            each = each + twice.square().sum(1)
        named = {
            "a part": classes,
            "another tensor": 2 * classes,
            "one made from another": (classes, numbers, twice),
            "all": {"classes": classes, "numbers": numbers},
        }[given]
        return lsa.Terms(each.sum(), len(each), each, outputs=named)

    model = mlp(5)
    landscape = lsa.Landscape(model, loader(), objective=objective)
    if given != "all":
        with pytest.raises(InputError, match=r"gradient through Terms\.outputs is .* off"):
            landscape.gauss_newton(landscape.theta)
        result = lsa.lanczos(landscape, k=1, k_min=0, density_probes=0)
        assert "gauss_newton_lambda_max" not in result
        assert any("the Gauss–Newton split is left out" in note for note in result.notes)
        return
    fine = copy.deepcopy(model).double()
    derivatives: Any = torch.autograd.functional
    named = {n: p.detach() for n, p in fine.named_parameters()}

    def outputs_at(flat: Tensor) -> Tensor:
        split = flat.split([p.numel() for p in named.values()])
        parts = {n: t.view_as(p) for (n, p), t in zip(named.items(), split, strict=True)}
        return functional_call(fine, parts, X.double()).reshape(-1)

    at = torch.cat([p.reshape(-1) for p in named.values()])
    J = derivatives.jacobian(outputs_at, at)
    B = derivatives.hessian(lambda o: whole(o.view(24, 5), Y).mean(), outputs_at(at))
    v = torch.linspace(-1, 1, len(at))
    torch.testing.assert_close(
        landscape.gauss_newton(landscape.theta)(v).double(),
        J.T @ (B @ (J @ v.double())),
        rtol=1e-4,
        atol=1e-6,
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
