"""Networks in unusual forms: exported, quantized, normed, without numbers, of two precisions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import agree, bound
from tiny import N, images, rng, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lsa
from lsa.landscape import Landscape, flatten
from lsa.probe import find

pytestmark = [
    pytest.mark.usefixtures("global_rng_untouched"),
    pytest.mark.filterwarnings("ignore"),
]
X = torch.randn(N, 4, generator=rng()).double()
Y = torch.arange(N) % 3


def each(f: Any) -> Tensor:
    return F.cross_entropy(f(X), Y, reduction="none")


def right(model: nn.Module, **options: Any) -> Landscape:
    landscape = Landscape(model, X, Y, **options)
    agree(landscape, flatten(model), lambda f: each(f).mean(), each)
    assert not landscape.remarks
    return landscape


@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        parametrizations.orthogonal,
    ],
)
def test_parametrized_weights(norm):
    right(seeded(lambda: nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))).eval())


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_has_right_second_derivatives(norm, dim):
    """Those of torch's fused kernel are wrong; the oracle is the formula, w = g v/‖v‖."""

    class Formula(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(5, 3)
            self.bias, self.g, self.v = map(nn.Parameter, start)

        def forward(self, x: Tensor) -> Tensor:
            rest = [i for i in (0, 1) if i != dim]
            w = self.g * self.v / self.v.square().sum(rest, keepdim=True).sqrt()
            return self.last(torch.tanh(F.linear(x, w, self.bias)))

    model = seeded(
        lambda: nn.Sequential(norm(nn.Linear(4, 5), dim=dim), nn.Tanh(), nn.Linear(5, 3))
    )
    start = [p.detach().clone() for p in model[0].parameters()]
    formula = seeded(Formula)
    formula.last = copy.deepcopy(model[2])
    exact = Landscape(formula, X, Y)
    found, theta = Landscape(model, X, Y), flatten(model)
    torch.testing.assert_close(theta, exact.theta[order(exact)])
    v = torch.randn(len(theta), generator=rng(3)).double()
    back = torch.empty_like(v)
    back[order(exact)] = v
    for name in ("hessian", "gauss_newton", "covariance"):
        wanted = getattr(exact, name)(exact.theta)(back)[order(exact)]
        torch.testing.assert_close(getattr(found, name)(theta)(v), wanted, msg=name)
    torch.testing.assert_close(found.curvatures(theta, v), exact.curvatures(exact.theta, back))
    assert not found.remarks
    assert find("lanczos")(landscape=found, theta=theta, k=1, density_probes=0).converged


def order(exact: Landscape) -> Tensor:
    """Where the formula's numbers stand in the order of the normed network."""
    names = list(exact.unflatten(exact.theta))
    sizes = dict(zip(names, exact.network.sizes, strict=True))
    starts = {n: sum(sizes[m] for m in names[: names.index(n)]) for n in names}
    wanted = ("bias", "g", "v", "last.weight", "last.bias")
    return torch.cat([torch.arange(starts[n], starts[n] + sizes[n]) for n in wanted])


def test_an_exported_program():
    model, _, _ = images()
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: rows},)).module()
    assert isinstance(exported, nn.Module)
    found, plain, theta = Landscape(exported, X, Y), Landscape(model, X, Y), flatten(model)
    for name in ("losses", "gradient"):
        torch.testing.assert_close(getattr(found, name)(theta), getattr(plain, name)(theta))
    torch.testing.assert_close(found.hessian(theta)(theta), plain.hessian(theta)(theta))
    torch.testing.assert_close(found.covariance(theta)(theta), plain.covariance(theta)(theta))


def test_ddp_in_one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1
    )
    try:
        model, _, _ = images()
        wrapped = nn.parallel.DistributedDataParallel(model)
        landscape, theta = Landscape(wrapped, X, Y), flatten(wrapped)
        assert torch.equal(landscape.gradient(theta), Landscape(model, X, Y).gradient(theta))
    finally:
        torch.distributed.destroy_process_group()


class Means(nn.Module):
    """Of sequences that are as long as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(torch.stack([t.mean(0) for t in h.unbind()]))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_in_batches(layout):
    parts = [torch.randn(i % 4 + 1, 4, generator=rng(i)).double() for i in range(N)]

    def nested(i: int, j: int) -> Tensor:
        return torch.nested.nested_tensor(parts[i:j], layout=layout)

    def losses(f: bound) -> Tensor:
        w, b, last, c = f.parameters()
        scores = [torch.relu(t @ w.T + b).mean(0) @ last.T + c for t in parts]
        return F.cross_entropy(torch.stack(scores), Y, reduction="none")

    model = seeded(Means)
    landscape = Landscape(model, [(nested(0, 6), Y[:6]), (nested(6, N), Y[6:])])
    agree(landscape, flatten(model), lambda f: losses(f).mean(), losses, rounding=1e-7)
    with pytest.raises(lsa.InputError, match=r"are a nested tensor.* give batches"):
        Landscape(model, nested(0, N), Y)


def test_sparse_inputs_in_batches():
    class Sparse(Means):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(torch.sparse.mm(x, self.a.weight.T) + self.a.bias))

    model, x = seeded(Sparse), X * (X > 0)
    landscape = Landscape(model, [(x[:5].to_sparse(), Y[:5]), (x[5:].to_sparse(), Y[5:])])

    def losses(f: Any) -> Tensor:
        return F.cross_entropy(f(x.to_sparse()), Y, reduction="none")

    agree(landscape, flatten(model), lambda f: losses(f).mean(), losses)
    for inputs in (x.to_sparse(), x.to_sparse_csr()):
        with pytest.raises(lsa.InputError, match=r"are a sparse tensor.* give batches"):
            Landscape(model, inputs, Y)


def test_a_connectionist_loss_by_differences():
    """CTC (Graves et al. 2006) has no second derivative in torch; differences are the oracle."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    x = torch.randn(N, 8, 4, generator=rng()).double()
    y = torch.randint(1, 5, (N, 3), generator=rng(1))

    def loss(o: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        lengths = torch.full((len(y),), 8), torch.full((len(y),), 3)
        return F.ctc_loss(o.log_softmax(2).transpose(0, 1), y, *lengths, reduction=reduction)

    model = seeded(Network)
    landscape, theta = Landscape(model, x, y, loss), flatten(model)

    def losses(t: Tensor) -> Tensor:
        return loss(bound(landscape, t)(x), y, "none") / 3

    def gradient(t: Tensor) -> Tensor:
        t = t.detach().requires_grad_()
        return torch.autograd.grad(losses(t).mean(), t)[0]

    v = torch.randn(len(theta), generator=rng(5)).double()
    torch.testing.assert_close(landscape.losses(theta), losses(theta))
    torch.testing.assert_close(landscape.gradient(theta), gradient(theta))
    step = 1e-4
    wanted = (gradient(theta + step * v) - gradient(theta - step * v)) / (2 * step)
    product = landscape.hessian(theta)(v)
    assert (product - wanted).norm() < 1e-6 * wanted.norm()
    slopes = (losses(theta + step * v) - losses(theta - step * v)) / (2 * step)
    assert (landscape.slopes(theta, v) - slopes).norm() < 1e-6 * slopes.norm()
    bends = (losses(theta + step * v) + losses(theta - step * v) - 2 * losses(theta)) / step**2
    assert (landscape.curvatures(theta, v) - bends).norm() < 1e-5 * bends.norm()
    assert {"hessian", "curvatures"} <= landscape.remarks.keys()
    for name in ("sharpness", "layers", "sgd_noise", "lanczos"):
        found = find(name)(landscape=landscape, theta=theta)
        assert name == "sharpness" or any("by differences" in note for note in found.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["tensors", "batches"])
def test_probes_of_a_network_in_half_precision(dtype, way):
    exact, _, _ = images()
    half, x = copy.deepcopy(exact).to(dtype), X.to(dtype)
    data = (x, Y) if way == "tensors" else ([(x[:5], Y[:5]), (x[5:], Y[5:])],)
    found, truth = Landscape(half, *data), Landscape(exact, X, Y)
    for name, key in (("lanczos", "lambda_max"), ("sharpness", "sam_rise"), ("layers", "total")):
        a, b = (find(name)(landscape=place, theta=place.theta).metrics for place in (found, truth))
        key = key if key in b else next(iter(b))
        assert a[key].value == pytest.approx(b[key].value, rel=3e-2), name


def test_frozen_parts_may_be_complex_or_of_8_bits():
    class Adapted(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            w = torch.randn(5, 4, generator=rng(1))
            stored = {
                "int8": (w * 30).round().to(torch.int8),
                "float8": w.to(torch.float8_e4m3fn),
                "complex": w.to(torch.complex64),
            }[kind]
            self.w = nn.Parameter(stored, requires_grad=False)
            self.down = nn.Parameter(torch.randn(2, 4, generator=rng(2)))
            self.up = nn.Parameter(torch.randn(5, 2, generator=rng(3)))
            self.last = nn.Linear(5, 3)

        def dense(self) -> Tensor:
            return self.w.abs() if self.w.is_complex() else self.w.to(self.up.dtype) / 30

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(x @ (self.dense() + self.up @ self.down).T))

    for kind in ("int8", "float8", "complex"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Adapted(kind)
        base = model.dense().double()

        def losses(f: Any, base: Tensor = base) -> Tensor:
            down, up, w, b = f.parameters()
            h = torch.tanh(X @ (base + up.double() @ down.double()).T)
            return F.cross_entropy(h @ w.double().T + b.double(), Y, reduction="none")

        landscape = Landscape(model, X.float(), Y)
        theta = landscape.theta
        t = theta.double().requires_grad_()
        (wanted,) = torch.autograd.grad(losses(bound(landscape, t)).mean(), t)
        torch.testing.assert_close(landscape.gradient(theta), wanted.float())
        assert find("lanczos")(landscape=landscape, theta=theta, k=1).converged


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: torch.ao.quantization.quantize_dynamic(images()[0].float()), "no trainable"),
        (lambda: images()[0].to("meta"), "on the device meta"),
        (lambda: Kept(nn.Linear(4, 3), nn.BatchNorm1d(3)), "batch norm '1' stays in training"),
        (
            lambda: nn.Linear(4, 3).requires_grad_(False).to(torch.float8_e4m3fn).requires_grad_(),
            "is torch.float8_e4m3fn, in which no step",
        ),
    ],
    ids=["quantized", "meta", "batch norm kept in train()", "float8"],
)
def test_forms_without_a_landscape_are_refused_in_one_line(make, line):
    with torch.random.fork_rng():
        model = make()
    with pytest.raises(lsa.InputError, match=line) as caught:
        Landscape(model, X, Y)
    assert "\n" not in str(caught.value)


class Kept(nn.Sequential):
    """Stays in training mode, whatever it is told."""

    def train(self, mode: bool = True) -> Kept:
        return super().train()


def test_in_place_operations_hooks_shared_unused_and_strided_parameters():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.again, self.unused = self.b, nn.Linear(3, 3)
            self.w = nn.Parameter(torch.randn(4, 5, generator=rng(1)).T)
            self.fixed = nn.Parameter(torch.randn(5, generator=rng(2)), requires_grad=False)
            self.a.register_forward_hook(lambda module, args, out: out * 1.5)

        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(self.a(x))
            h.add_(1.5)
            h = torch.tanh(self.b(h) + x @ self.w.T) + self.fixed
            return self.c(torch.tanh(self.again(h)))

    landscape = right(seeded(Odd))
    found = find("layers")(landscape=landscape, theta=landscape.theta, probes=2)
    assert any("unused" in note for note in found.notes)


def test_a_fourier_transform_inside():
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.fft.rfft(torch.tanh(self.a(x)))
            return self.b(torch.cat([h.real, h.imag], 1))

    right(seeded(Spectral))


def test_an_ensemble_by_vmap_and_a_functional_network():
    networks = [images()[0] for _ in range(2)]
    with torch.no_grad():
        for p in networks[1].parameters():
            p.add_(0.1)
    parameters, _ = torch.func.stack_module_state(networks)
    base = copy.deepcopy(networks[0]).to("meta")

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ParameterList(p.detach() for p in parameters.values())

        def forward(self, x: Tensor) -> Tensor:
            def one(*values: Tensor) -> Any:
                named = dict(zip(parameters, values, strict=True))
                return torch.func.functional_call(base, named, (x,))

            return torch.func.vmap(one)(*self.members).mean(0)

    right(seeded(Ensemble))


def test_a_memory_mapped_array_is_read_as_it_lies(tmp_path):
    import numpy as np

    model, _, _ = images()
    path = tmp_path / "x.npy"
    np.save(path, X.numpy())
    mapped = np.load(path, mmap_mode="r")
    found, plain, theta = (
        Landscape(model, mapped, Y.numpy()),
        Landscape(model, X, Y),
        flatten(model),
    )
    assert torch.equal(found.gradient(theta), plain.gradient(theta))


def test_straight_through_gradients_are_not_those_of_the_loss():
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.b(h + ((4 * h).round() / 4 - h).detach())

    model = seeded(Rounded)
    with pytest.raises(lsa.InputError, match="gradient is not that of the loss"):
        find("lanczos")(landscape=Landscape(model, X, Y), theta=flatten(model))
