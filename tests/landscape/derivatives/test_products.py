"""Products against dense matrices, whatever is kept between them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import hessian, jacrev
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import gpt
from lsa.landscape import Landscape, flatten, objectives
from lsa.runtime.errors import InputError

N = 11
PRODUCTS = ["hessian", "gauss_newton", "covariance"]


def landscape(memory: int | None = None) -> Landscape:
    """A small convolutional network in float64, three uneven chunks of data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
            nn.Conv2d(3, 2, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3),
        ).double()  # fmt: skip
        x, y = torch.randn(N, 1, 6, 6).double(), torch.randint(0, 3, (N,))
    return Landscape(model, x, y, chunk=4, memory=memory)


def dense(at: Landscape, theta: Tensor, name: str) -> Tensor:
    """The matrix by its definition, all samples at once."""

    def outputs(t: Tensor) -> Tensor:
        return at.outputs(t, at.x)

    def losses(t: Tensor) -> Tensor:
        return F.cross_entropy(outputs(t), at.y, reduction="none")

    if name == "hessian":
        return hessian(lambda t: losses(t).mean())(theta)
    J = jacrev(losses if name == "covariance" else outputs)(theta)
    if name == "covariance":
        return torch.cov(J.T, correction=0)
    p = outputs(theta).softmax(1)
    curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("nid,nij,nje->de", J, curvature, J) / N


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_equal_those_of_the_dense_matrix(name):
    at = landscape()
    theta = flatten(at.model)
    product = getattr(at, name)(theta)
    wanted = dense(at, theta, name)
    found = torch.stack([product(e) for e in torch.eye(len(theta)).double()], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


class Sinh(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.sinh()


@pytest.mark.parametrize("name", PRODUCTS)
def test_weights_that_are_computed_from_parameters(name):
    """The value of a weight's gradient then enters the second derivative."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolution = nn.Conv2d(1, 2, 3)
        register_parametrization(convolution, "weight", Sinh())
        model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
        x, y = torch.randn(N, 1, 4, 4).double(), torch.randint(0, 3, (N,))
    at = Landscape(model, x, y)
    theta = flatten(at.model)
    product = getattr(at, name)(theta)
    found = torch.stack([product(e) for e in torch.eye(len(theta)).double()], 1)
    torch.testing.assert_close(found, dense(at, theta, name), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
def test_what_is_kept_changes_no_bit(name):
    v = torch.randn(landscape().dimension, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for memory in (0, 20_000, None):
        at = landscape(memory)
        product = getattr(at, name)(flatten(at.model))
        found += [product(v), product(-v).neg(), product(v)]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(
    ("name", "memory", "builds"),
    [
        ("hessian", 0, 9),
        ("hessian", 20_000, 7),
        ("hessian", None, 3),
        ("gauss_newton", 0, 9),
        ("gauss_newton", None, 3),
    ],
)
def test_graphs_are_kept_while_they_fit(name, memory, builds):
    """Three products over three chunks; a chunk of four holds about 15 kB."""
    at = landscape(memory)
    passes = []
    at.model.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    product = getattr(at, name)(flatten(at.model))
    for _ in range(3):
        product(torch.ones(at.dimension).double())
    assert len(passes) == builds


@pytest.mark.parametrize("size", [4, N])
@pytest.mark.parametrize("memory", [0, 20_000, 1 << 30])
def test_products_over_batches_are_those_of_the_dense_hessian(size, memory):
    whole = landscape()
    theta = flatten(whole.model)
    batches = list(zip(whole.x.split(size), whole.y.split(size), strict=True))
    at = Landscape(whole.model, batches, loss=F.cross_entropy, memory=memory)
    wanted, product = dense(whole, theta, "hessian"), at.hessian(theta)
    V = torch.randn(len(theta), 3, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(2):
        torch.testing.assert_close(product(V), wanted @ V)
        torch.testing.assert_close(product(V[:, 0]), wanted @ V[:, 0])


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made within the block hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_a_product_with_nothing_kept_holds_at_most_twice_what_a_gradient_does():
    model = gpt.build(gpt.Shape(4, 32, 2, 64, 64)).eval()
    ids = gpt.text(8, 65, 64)
    at = Landscape(
        model, [(ids[:, :-1], ids[:, 1:])], objective=objectives.per_token(shift=False), memory=0
    )
    product, v = at.hessian(at.theta), torch.ones(at.dimension)
    with Allocated() as gradient:
        at.gradient(at.theta)
    for _ in range(2):
        with Allocated() as own:
            product(v)
        assert own.most < 2 * gradient.most


def test_sample_curvatures_of_the_gauss_newton_part_equal_the_dense_ones():
    at = landscape()
    theta = flatten(at.model)
    u = torch.randn(len(theta), generator=torch.Generator().manual_seed(2)).double()
    moved = jacrev(lambda t: at.outputs(t, at.x))(theta) @ u  # (N, C)
    p = at.outputs(theta, at.x).softmax(1)
    wanted = (p * moved.square()).sum(1) - (p * moved).sum(1).square()  # variance of J u under p
    torch.testing.assert_close(at.gauss_newton_curvatures(theta, u), wanted)


def test_the_size_of_a_graph_is_what_is_kept_of_it():
    at = landscape(20_000)
    size = at.graph_size(flatten(at.model)) * 4  # of a chunk
    assert 10_000 < size < 20_000  # so that one chunk is kept and not two, as counted above


class Once(torch.autograd.Function):
    """tanh, the gradient of which PyTorch is told not to differentiate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        (x,) = ctx.saved_tensors
        return gradients[0] * (1 - x.tanh() ** 2)


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def once_differentiable_landscape() -> Landscape:
    model = nn.Sequential(nn.Linear(3, 4), Layer(), nn.Linear(4, 2))
    return Landscape(model, torch.randn(5, 3), torch.randint(2, (5,)))


class Marked(torch.autograd.Function):
    """The identity, with something that lives as long as its graph does."""

    @staticmethod
    def forward(ctx, x, mark):
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


class Marks(nn.Module):
    """Puts marks into the graphs through it, and knows them as long as they live."""

    def __init__(self):
        super().__init__()
        self.living = weakref.WeakSet()

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        mark = Mark()
        self.living.add(mark)
        return Marked.apply(x, mark)


class Mark:
    """What can be referred to weakly."""


@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_what_is_kept_is_given_up_with_the_operator(name, activation):
    marks = Marks()
    model = nn.Sequential(nn.Linear(3, 5), marks, activation(), nn.Linear(5, 2))
    landscape = Landscape(model, torch.randn(8, 3), torch.arange(8) % 2, chunk=4, memory=1 << 30)
    theta = flatten(model)
    matvec = getattr(landscape, name)(theta)
    matvec(theta)
    assert len(marks.living) == 2  # one for each pass
    del matvec
    gc.collect()
    assert not marks.living


def test_where_there_is_no_second_derivative_products_are_by_differences():
    """`autograd.grad` leaves it out in silence: the Hessian would be wrong by 87 % here."""
    at = once_differentiable_landscape()
    theta = flatten(at.model)
    model = nn.Sequential(at.model[0], nn.Tanh(), at.model[2])
    exact = Landscape(model, at.x, at.y).hessian(theta)(theta)
    found = at.hessian(theta)(theta)
    assert (found - exact).norm() < 1e-3 * exact.norm()
    assert "differences of gradients, as an operation" in at.remarks["hessian"]


def test_the_gauss_newton_part_without_derivatives_is_refused():
    at = once_differentiable_landscape()
    theta = flatten(at.model)
    with pytest.raises(InputError, match="has no second derivative"):
        at.gauss_newton(theta)(theta)


def test_the_covariance_needs_no_second_derivative():
    at = once_differentiable_landscape()
    theta = flatten(at.model)
    rows = torch.stack([at.subset(torch.tensor([i])).gradient(theta) for i in range(5)])
    rows -= rows.mean(0)
    torch.testing.assert_close(at.covariance(theta)(theta), rows.T @ (rows @ theta) / 5)


@pytest.mark.parametrize("memory", [0, 3_000, 6_500, 1 << 30])  # none, one, all; as rows
def test_the_covariance_is_the_same_by_layers_and_through_the_graph(monkeypatch, memory):
    at = landscape(memory)
    theta = flatten(at.model)
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(2)).double()
    layered = at.covariance(theta)
    monkeypatch.setattr(at, "_known_by_layers", lambda theta: False)
    through = at.covariance(theta)
    for _ in range(2):  # the second with what was kept of the first
        torch.testing.assert_close(layered(v), through(v))


@pytest.mark.parametrize("name", PRODUCTS)
def test_engine_choices_do_not_change_the_numbers(name):
    """Chunks, kept graphs, threads and memory layout are choices of speed alone."""
    whole = landscape()
    theta = flatten(whole.model).float()
    model = whole.model.float()
    x, y = whole.x.float(), whole.y
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(2))

    def product(threads: int = 1, **options: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            at = Landscape(model, x, y, **options)
            return getattr(at, name)(theta)(v)
        finally:
            torch.set_num_threads(before)

    base = product(chunk=N, memory=0)
    for options in ({"chunk": 1}, {"chunk": 4}, {"chunk": 4, "memory": 1 << 30}, {"threads": 2}):
        torch.testing.assert_close(product(**options), base, rtol=1e-5, atol=1e-6)


def test_a_tensor_that_is_changed_after_its_use_is_no_wrong_product():
    """PyTorch checks this, except where hooks weigh what a graph saves."""

    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            out = self.b(h)
            h.mul_(2)
            return out

    at = Landscape(Doubles(), torch.randn(6, 4), torch.arange(6) % 3, products="exact")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        at.hessian(at.theta)(at.theta)


class Demanding(torch.autograd.Function):
    """z² with derivatives that, as some kernels do, take contiguous cotangents alone."""

    @staticmethod
    def forward(ctx, z):  # pyright: ignore
        ctx.save_for_backward(z)
        return z**2

    @staticmethod
    def backward(ctx, *cotangents):  # pyright: ignore
        (z,) = ctx.saved_tensors
        return Slope.apply(z, *cotangents)


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, cotangent):  # pyright: ignore
        ctx.save_for_backward(z, cotangent)
        return 2 * z * cotangent

    @staticmethod
    def backward(ctx, *cotangents):  # pyright: ignore
        z, cotangent = ctx.saved_tensors
        assert cotangents[0].is_contiguous(), "expected contiguous cotangents"
        return 2 * cotangents[0] * cotangent, 2 * z * cotangents[0]


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(1, 2, 6).double().view(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ Demanding.apply(self.w).T  # pyright: ignore


@pytest.mark.parametrize("batches", [False, True])
def test_a_vector_may_be_a_column_of_others(batches):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, y, v = torch.randn(5, 3).double(), torch.arange(5) % 2, torch.randn(6, 2).double()
    at = Landscape(Squares(), [(x, y)]) if batches else Landscape(Squares(), x, y)
    product = at.hessian(at.theta, exact=True)
    wanted = hessian(lambda t: F.cross_entropy(x @ t.view(2, 3).square().T, y))(at.theta) @ v
    torch.testing.assert_close(product(v), wanted)
    torch.testing.assert_close(product(v[:, 0]), wanted[:, 0])
