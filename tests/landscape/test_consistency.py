"""Every fault that a landscape may have, planted; of sound landscapes nothing is said."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsa.landscape import Landscape, consistency, flatten
from lsa.landscape.derivatives import budget
from lsa.landscape.terms import Terms
from lsa.probe import find
from lsa.runtime.errors import InputError
from lsa.training import data, models

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


class Planted(nn.Module):
    """A small network with one layer of a test's choice inside."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.first, self.inside, self.last = nn.Linear(6, 8), inside, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(torch.tanh(self.first(x))))


def place(inside: nn.Module, n: int = 40, **options: Any) -> tuple[Landscape, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 6, generator=rng), torch.randint(3, (n,), generator=rng)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Planted(inside)
    return Landscape(network, x, y, **options), flatten(network)


def said(inside: nn.Module, **options: Any) -> str:
    return "; ".join(consistency.notes(*place(inside, **options)))


# --- sound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside",
    [
        nn.Identity(), nn.ReLU(), nn.GELU(), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.LayerNorm(8),
        nn.MaxPool1d(1), nn.Hardswish(), nn.LeakyReLU(),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_of_a_sound_landscape_nothing_is_said(inside):
    assert said(inside) == ""


@pytest.mark.parametrize("name", ["simple_cnn", "mlp", "resnet20"])
def test_of_the_models_of_lsa_nothing_is_said(name):
    split = data.load("digits", train_limit=20, val_limit=10)
    model = models.build(name, input_shape=(1, 8, 8), classes=10, seed=0)
    landscape = Landscape(model, split.x_train, split.y_train)
    assert consistency.notes(landscape, flatten(model)) == ()


class InFloat32(nn.Module):
    """As layers do that are not to lose range in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.float()).to(x.dtype)


def test_a_layer_that_computes_in_float32_is_no_fault():
    assert said(InFloat32()) == ""


class WeightsInFloat32(nn.Module):
    """Weights and all, as a network whose forward pass casts them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = Planted(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: p.float() for name, p in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, weights, x.float())


@pytest.mark.parametrize("seed", range(4))
def test_a_loss_in_float32_is_no_fault_although_small_steps_do_not_move_it(seed):
    x, y = torch.linspace(-1, 1, 24).view(4, 6), torch.arange(4) % 3
    landscape = Landscape(WeightsInFloat32(seed), x, y)
    assert consistency.notes(landscape, landscape.theta) == ()

    def own(model: nn.Module, batch: Any) -> Terms:  # as Hugging Face computes it
        logits = model(batch[0]).float()
        return Terms(F.cross_entropy(logits, batch[1]) * len(logits), len(logits))

    landscape = Landscape(landscape.model.get_submodule("inner"), [(x, y)], objective=own)
    assert consistency.notes(landscape, landscape.theta) == (consistency.UNITS,)


def test_a_minimum_without_slope_is_no_fault():
    with torch.random.fork_rng():
        model = nn.Linear(6, 1, bias=False)
    x = place(nn.Identity())[0].x
    landscape = Landscape(model, x, torch.zeros(len(x), 1), nn.MSELoss())
    assert consistency.notes(landscape, torch.zeros(6)) == ()


class Sharp(nn.Module):
    """|w|^(3/2) close to w = 0, where it bends over less than any step of a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((8,), 1e-13))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w.abs() ** 1.5


def test_a_bend_sharper_than_all_steps_is_no_fault_but_told():
    assert "the Hessian product could not be checked" in said(Sharp())


# --- planted faults -------------------------------------------------------------------------------


class AlwaysDrops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)


class StaysInTraining(nn.Dropout):
    def train(self, mode: bool = True) -> StaysInTraining:
        return super().train(True)


class DrawsBySize(nn.Module):
    """What a sample draws depends on how many there are, as on every GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape[::-1], device=x.device).T


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.01 * self.calls)


class CountsInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x


class FromElsewhere(nn.Module):
    """Noise that the global random state does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.source = iter(range(10**6))

    def __deepcopy__(self, memo: dict) -> FromElsewhere:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * (next(self.source) * 0.618 % 1)


class MixesSamples(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class NeedsTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise ValueError("two samples or more")
        return x


@pytest.mark.parametrize(
    ("inside", "line"),
    [
        (AlwaysDrops(), "draws random numbers when it is evaluated"),
        (DrawsBySize(), "draws random numbers when it is evaluated"),
        (StaysInTraining(), "module 'inside' (StaysInTraining) is in training mode"),
        (CountsInABuffer(), "changes its buffer 'inside.seen'"),
        (NeedsTwo(), "a sample alone cannot be evaluated: two samples or more"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_makes_the_loss_no_fixed_function_is_a_note(inside, line):
    found = said(inside)
    assert line in found and "\n" not in found


@pytest.mark.parametrize("inside", [Counts(), FromElsewhere()], ids=["Counts", "FromElsewhere"])
def test_a_loss_that_changes_from_pass_to_pass_is_refused(inside):
    with pytest.raises(InputError, match="two passes over the same samples give the losses"):
        said(inside)


def test_a_layer_that_mixes_samples_is_refused():
    with pytest.raises(InputError, match="a layer mixes them"):
        said(MixesSamples())


class RoundsBySize(nn.Module):
    """In float32 its outputs depend on the size of a pass in the last digits, as products do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 1e-4 * len(x)) if x.dtype == torch.float32 else x


def test_rounding_of_a_small_loss_is_no_fault():
    assert said(RoundsBySize()) == ""


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_that_is_no_mean_is_refused(reduction):
    with pytest.raises(InputError, match="no mean over samples"):
        said(nn.Identity(), loss=nn.CrossEntropyLoss(reduction=reduction))


def test_derivatives_are_checked_although_something_else_is_noted():
    class Both(CountsInABuffer):
        def forward(self, x: Tensor) -> Tensor:
            return WrongBackward.apply(super().forward(x))

    with pytest.raises(InputError, match="the gradient is not that of the loss"):
        said(Both())


class WrongBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sin(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        (x,) = ctx.saved_tensors
        return 1.2 * grad * torch.cos(x)


class WrongDoubleBackward(WrongBackward):
    """The backward is right, but its own derivative is lost."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        (x,) = ctx.saved_tensors
        return grad * torch.cos(x.detach())


class Once(WrongBackward):
    """Not to be differentiated twice."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        (x,) = ctx.saved_tensors
        return grad * torch.cos(x)


class Applies(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Rounds(torch.autograd.Function):
    """Straight through: a jump forward, the identity backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        return grad


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (WrongBackward, "the gradient is not that of the loss"),
        (WrongDoubleBackward, "the Hessian product is not the derivative of the gradient"),
        (Rounds, "the gradient is not that of the loss"),
    ],
)
def test_wrong_derivatives_are_refused_in_one_line(function, line):
    with pytest.raises(InputError, match=line) as refused:
        said(Applies(function))
    remedy = "products=" if "Hessian" in line else "LSA_CONSISTENCY=off"
    assert remedy in str(refused.value) and "\n" not in str(refused.value)


class OnlyFloat32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("this kernel takes float32")
        return x


def test_what_cannot_be_checked_is_a_note():
    assert "not checked against differences: this kernel takes float32" in said(OnlyFloat32())


def test_at_a_kink_it_says_so_and_blames_nobody():
    landscape, theta = place(nn.ReLU())
    at = theta.clone()
    names = landscape.unflatten(at)
    names["first.weight"].zero_()  # every unit is exactly at the kink of the ReLU
    names["first.bias"].zero_()
    assert "kinks or jumps at this checkpoint" in consistency.notes(landscape, at)[0]


# --- how it is asked ------------------------------------------------------------------------------


def test_a_probe_carries_the_note_and_refuses_what_is_plainly_wrong(monkeypatch):
    landscape, theta = place(CountsInABuffer())
    options = {"landscape": landscape, "theta": theta, "k": 1, "density_probes": 0}
    assert any("changes its buffer" in note for note in find("lanczos")(**options).notes)
    landscape, theta = place(Applies(WrongBackward))
    options |= {"landscape": landscape, "theta": theta}
    with pytest.raises(InputError, match="not that of the loss"):
        find("lanczos")(**options)
    monkeypatch.setattr(budget, "_configured", budget.Settings(check=False))
    assert consistency.notes(landscape, theta) == ()


def test_it_is_asked_once_at_a_checkpoint_and_costs_little(monkeypatch):
    landscape, theta = place(nn.Identity())
    asked = []
    own = Landscape.loss_and_gradient
    monkeypatch.setattr(
        Landscape, "loss_and_gradient", lambda self, t: (asked.append(len(self.x)), own(self, t))[1]
    )
    began = time.process_time()
    assert consistency.notes(landscape, theta) == ()
    assert asked == [2, 2]  # two gradients of two samples
    assert time.process_time() - began < 20
    assert consistency.notes(landscape, theta.clone()) == () and len(asked) == 2
    consistency.notes(landscape, theta + 1)
    assert len(asked) == 4


def test_numbers_are_the_same_with_and_without(monkeypatch):
    landscape, theta = place(nn.GELU())

    def numbers() -> dict[str, float]:
        found = find("sgd_noise")(landscape=landscape, theta=theta, k=1, probes=2)
        return {name: metric.value for name, metric in found.metrics.items()}

    checked = numbers()
    monkeypatch.setattr(budget, "_configured", budget.Settings(check=False))
    assert numbers() == checked


def test_without_second_derivatives_a_probe_that_needs_none_goes_on():
    note = said(Applies(Once))
    assert "not checked: an operation of the network has no second derivative" in note


def test_while_a_gradient_is_computed_it_holds_five_vectors_in_float64(monkeypatch):
    """θ, the direction, the product, the other gradient, and where this one is computed."""
    width = 500
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
        x = torch.randn(4, width)
    landscape = Landscape(model, x, torch.tensor([0, 1, 0, 1]))
    theta, held = landscape.theta, []
    own = Landscape.loss_and_gradient

    def in_float64() -> dict[int, Tensor]:
        """A tensor of every storage that the process holds."""
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        found = [t for t in tensors if t.dtype == torch.float64]
        return {t.untyped_storage().data_ptr(): t for t in found}

    before = in_float64()  # of other tests

    def seen(self: Landscape, at: Tensor) -> tuple[float, Tensor]:
        new = [t for where, t in in_float64().items() if where not in before]
        held.append(sum(t.untyped_storage().nbytes() for t in new) / (8 * len(theta)))
        return own(self, at)

    monkeypatch.setattr(Landscape, "loss_and_gradient", seen)
    assert consistency.notes(landscape, theta) == ()
    assert len(held) == 2 and 4 < max(held) < 5.2
