"""Networks as people write them: each right to a dense oracle, or refused in one line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from tiny import N, images, rng, seeded
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import lsa
from lsa import objectives
from lsa.landscape import Landscape, flatten
from lsa.probe import find

pytestmark = [
    pytest.mark.usefixtures("global_rng_untouched"),
    pytest.mark.filterwarnings("ignore:.*non-writable.*"),
]
T, WORDS = 5, 9
IDS = torch.randint(1, WORDS, (N, T), generator=rng(7))
Y = torch.arange(N) % 3


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.inner, self.last = kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)[0][:, -1])


class Embedded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4, **options)
        self.last = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.words(ids)).mean(1))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.EmbeddingBag(WORDS, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.words(ids)))


class Checkpointed(nn.Module):
    """Layers that are run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = checkpoint(lambda h, layer=layer: torch.tanh(layer(h)), x, use_reentrant=False)  # pyright: ignore
        return self.c(x)


class Experts(nn.Module):
    """Each sample goes to one of two experts, found by `nonzero`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(1)
        out = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            (rows,) = (p.argmax(1) == k).nonzero(as_tuple=True)
            out = out.index_add(0, rows, p[rows, k, None] * torch.tanh(expert(x[rows])))
        return out


class WritesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.sub_(0.5).mul_(2))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.a(x)


class FlatInTheEnd(nn.Module):
    """`view` needs the layout that the images had."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3), nn.Linear(3 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).view(len(x), -1))


class Slope(nn.Module):
    """Gives the derivative of its output by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)
        return slope[:, :3]


def x() -> Tensor:
    return torch.randn(N, 4, generator=rng()).double()


def sequences() -> Tensor:
    return torch.randn(N, T, 4, generator=rng()).double()


CASES = {
    "LSTM": (lambda: Recurrent(nn.LSTM), sequences),
    "GRU": (lambda: Recurrent(nn.GRU), sequences),
    "RNN": (lambda: Recurrent(nn.RNN), sequences),
    "embedding": (Embedded, lambda: IDS),
    "sparse embedding": (lambda: Embedded(sparse=True), lambda: IDS),
    "embedding weighed by frequency": (lambda: Embedded(scale_grad_by_freq=True), lambda: IDS),
    "activation checkpointing": (Checkpointed, x),
    "mixture of experts": (Experts, x),
    "in-place on the input": (WritesItsInput, x),
    "counter buffer": (Counts, x),
    "view after convolutions": (
        FlatInTheEnd,
        lambda: torch.randn(N, 2, 5, 5, generator=rng()).double(),
    ),
    "derivative in the forward pass": (Slope, x),
    "transformer layer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Flatten(), nn.Linear(20, 3)
        ),
        sequences,
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ["tensors", "batches"])
@pytest.mark.parametrize("name", CASES)
def test_a_network_is_right_and_stays_as_it_was(name, way):
    make, inputs = CASES[name]
    model, given = seeded(make), inputs()
    before, kept = copy.deepcopy(model.state_dict()), given.clone()
    batches = [(given[:5], Y[:5]), (given[5:], Y[5:])]
    data = (given, Y) if way == "tensors" else (batches,)

    def outputs(f: Any) -> Tensor:
        return f(kept.clone())

    landscape = Landscape(model, *data, chunk=6) if way == "tensors" else Landscape(model, *data)
    agree(
        landscape,
        flatten(model),
        lambda f: F.cross_entropy(outputs(f), Y),
        lambda f: F.cross_entropy(outputs(f), Y, reduction="none"),
    )
    assert not landscape.remarks  # all of it exactly
    assert torch.equal(given, kept)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("products", ["exact", "gradients"])
@pytest.mark.parametrize(
    "options", [{"padding_idx": 0}, {"sparse": True, "scale_grad_by_freq": True, "max_norm": 9.0}]
)
def test_options_of_an_embedding_are_none_of_the_loss(options, copy, products):
    """torch leaves a padding row's gradient out, so that training leaves it; L depends on it."""
    ids = IDS * (IDS > 3)
    model, plain = seeded(lambda: Embedded(**options)), seeded(Embedded)
    plain.load_state_dict(model.state_dict())
    exact = Landscape(plain, ids, Y, products=products)
    found = Landscape(model, ids, Y, copy=copy, products=products)
    theta, v = flatten(model), torch.linspace(-1, 1, found.dimension, dtype=torch.float64)
    torch.testing.assert_close(found.gradient(theta), exact.gradient(theta))
    torch.testing.assert_close(found.hessian(theta)(v), exact.hessian(theta)(v))
    torch.testing.assert_close(found.slopes(theta, v), exact.slopes(theta, v))
    assert {name: getattr(model.words, name) for name in options} == options


def test_an_embedding_bag_is_measured_by_differences():
    class Mean(Bag):
        def forward(self, ids: Tensor) -> Tensor:
            return self.last(torch.tanh(F.embedding(ids, self.words.weight).mean(1)))

    model, plain = seeded(Bag), seeded(Mean)
    theta, exact, found = flatten(model), Landscape(plain, IDS, Y), Landscape(model, IDS, Y)
    torch.testing.assert_close(found.gradient(theta), exact.gradient(theta))
    H = exact.hessian(theta)(theta)
    assert (found.hessian(theta)(theta) - H).norm() < 1e-6 * H.norm()
    assert "embedding_bag" in found.remarks["hessian"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_are_taken_off(wrap):
    model, inputs, y = images()
    wrapped = wrap(model)
    found, plain = Landscape(wrapped, inputs, y), Landscape(model, inputs, y)
    theta = flatten(wrapped)
    assert torch.equal(theta, flatten(model))
    assert torch.equal(found.gradient(theta), plain.gradient(theta))


def test_packed_sequences():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, packed: Any) -> Tensor:
            states, lengths = pad_packed_sequence(self.inner(packed)[0], batch_first=True)
            return self.last(states[torch.arange(len(lengths)), lengths - 1])

    lengths = torch.arange(N) % T + 1
    model, given = seeded(Packed), sequences()

    def packed(i: int, j: int) -> Any:
        return pack_padded_sequence(
            given[i:j], lengths[i:j], batch_first=True, enforce_sorted=False
        )

    def losses(f: Any) -> Tensor:
        return F.cross_entropy(f(packed(0, N)), Y, reduction="none")

    batches = [(packed(0, 6), Y[:6]), (packed(6, N), Y[6:])]
    agree(Landscape(model, batches), flatten(model), lambda f: losses(f).mean(), losses)


def test_a_variational_autoencoder_by_draws():
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log = self.a(x).chunk(2, 1)
            z = mean + (log / 2).exp() * torch.randn(mean.shape, dtype=mean.dtype)
            return self.b(z), mean, log

    def losses(model: Any, given: Tensor) -> Tensor:
        rebuilt, mean, log = model(given)
        divergence = (mean.square() + log.exp() - 1 - log).sum(1) / 2
        return (rebuilt - given).square().sum(1) + divergence

    def objective(model: nn.Module, batch: Tensor) -> lsa.Terms:
        each = losses(model, batch)
        return lsa.Terms(each.sum(), len(each), each)

    model, given = seeded(Autoencoder), x()

    def oracle(f: Any) -> Tensor:
        found = []
        for draw in range(4):
            with torch.random.fork_rng([]):
                torch.manual_seed(draw)
                found.append(losses(f, given))
        return torch.stack(found).mean(0)

    landscape = Landscape(model, [given], objective=objective, draws=4)
    agree(landscape, flatten(model), lambda f: oracle(f).mean(), oracle)


@pytest.mark.parametrize(
    "chosen", [["2.weight", "2.bias"], "2.*", lambda name, p: name.startswith("2")]
)
def test_parameters_by_name_glob_or_predicate(chosen):
    model, inputs, y = images()
    landscape = Landscape(model, inputs, y, parameters=chosen)
    whole = Landscape(model, inputs, y).gradient(flatten(model))
    assert landscape.dimension == 18
    torch.testing.assert_close(landscape.gradient(landscape.theta), whole[-18:])
    with pytest.raises(lsa.InputError, match="no parameter is named 3"):
        Landscape(model, inputs, y, parameters="3.*")


def test_without_a_copy_the_callers_network_is_as_before():
    model, inputs, y = images()
    model.train()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    landscape, theta = Landscape(model, inputs, y, copy=False), flatten(model)
    assert landscape.model is model
    exact = Landscape(model, inputs, y).hessian(2 * theta)(theta)
    torch.testing.assert_close(landscape.hessian(2 * theta)(theta), exact)
    landscape.losses(2 * theta)
    for name, p in model.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1]) and p.grad is None
    assert model.training


# --- what a network computes in another precision -------------------------------------------------


class Autocast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).float()


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_half_precision_is_measured_as_the_network_computes(kind):
    """Numbers are those of float64 within what bfloat16 rounds: 2⁻⁸ of each operation."""
    exact, inputs, y = images()
    inner = copy.deepcopy(exact)
    half = inner.bfloat16() if kind == "bfloat16" else Autocast(inner.float())
    given = inputs.bfloat16() if kind == "bfloat16" else inputs.float()
    found, truth = Landscape(half, given, y), Landscape(exact, inputs, y)
    theta = flatten(half)
    assert theta.dtype == torch.float32 and found.theta.dtype == torch.float32
    at = theta.double()
    assert found.loss(theta) == pytest.approx(truth.loss(at), rel=2e-2)
    for name in ("gradient", "losses"):
        a, b = getattr(found, name)(theta).double(), getattr(truth, name)(at)
        assert (a - b).norm() < 3e-2 * b.norm(), name
    v = torch.randn(len(theta), generator=rng(4))
    a, b = found.hessian(theta)(v).double(), truth.hessian(at)(v.double())
    assert (a - b).norm() < 5e-2 * b.norm()
    assert (found.slopes(theta, v).double() - truth.slopes(at, v.double())).norm() < 0.5


# --- what has no exact derivatives ----------------------------------------------------------------


class NoSecondDerivative(nn.Module):
    """tanh by a kernel whose backward pass cannot be differentiated, as fused kernels have it."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.tanh()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Tensor:
            (y,) = ctx.saved_tensors
            return gradients[0] * (1 - y * y)

    def forward(self, x: Tensor) -> Tensor:
        return self.Kernel.apply(x)


def test_a_kernel_without_second_derivatives_is_measured_by_differences():
    smooth, inputs, y = images()
    model = nn.Sequential(smooth[0], NoSecondDerivative(), smooth[2])
    found, truth = Landscape(model, inputs, y), Landscape(smooth, inputs, y)
    theta = flatten(model)
    v = torch.randn(len(theta), generator=rng(4)).double()
    for name in ("losses", "gradient"):
        torch.testing.assert_close(getattr(found, name)(theta), getattr(truth, name)(theta))
    for name in ("slopes", "curvatures"):
        a, b = getattr(found, name)(theta, v), getattr(truth, name)(theta, v)
        assert (a - b).norm() < 1e-5 * b.norm(), name
    exact = truth.hessian(theta)(v)
    assert (found.hessian(theta)(v) - exact).norm() < 1e-5 * exact.norm()
    torch.testing.assert_close(found.covariance(theta)(v), truth.covariance(theta)(v))
    result = find("lanczos")(landscape=found, theta=theta, k=1, density_probes=0)
    assert any("by differences of gradients" in note for note in result.notes)
    top = find("lanczos")(landscape=truth, theta=theta, k=1, density_probes=0)
    key = "lambda_max"
    assert result.metrics[key].value == pytest.approx(top.metrics[key].value, rel=1e-5)


def test_at_kinks_differences_are_refused():
    class Kinked(NoSecondDerivative):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.abs()

    smooth, inputs, y = images()
    model = nn.Sequential(smooth[0], Kinked(), smooth[2])
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    landscape, theta = Landscape(model, inputs, y), flatten(model)
    with pytest.raises(lsa.InputError, match="as they are at kinks"):
        landscape.hessian(theta)(torch.ones_like(theta))


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: torch.jit.trace(nn.Linear(4, 3).double(), x()), "is scripted"),
        (lambda: nn.LazyLinear(3), "has no shape yet"),
        (lambda: nn.Linear(4, 3, dtype=torch.complex64), "is complex"),
        (lambda: nn.Linear(4, 3).requires_grad_(False), "no trainable parameter"),
        (lambda: Embedded(max_norm=0.1), "rows longer than max_norm=0.1"),
    ],
    ids=["scripted", "lazy", "complex", "frozen", "max_norm"],
)
@pytest.mark.filterwarnings("ignore")
def test_networks_without_a_theta_are_refused_in_one_line(make, line):
    with torch.random.fork_rng():
        model = make()
    with pytest.raises(lsa.InputError, match=line):
        Landscape(model, x(), Y)


def test_max_norm_that_holds_is_left_out_of_the_loss():
    model = seeded(lambda: Embedded(max_norm=3.0))
    with torch.no_grad():
        model(torch.arange(WORDS)[None])  # shortens all rows
    plain = seeded(Embedded)
    plain.load_state_dict(model.state_dict())
    theta = flatten(model)
    found, exact = Landscape(model, IDS, Y), Landscape(plain, IDS, Y)
    assert torch.equal(found.gradient(theta), exact.gradient(theta))
    assert model.words.max_norm == 3.0


def test_objectives_are_exported():
    assert lsa.objectives is objectives
