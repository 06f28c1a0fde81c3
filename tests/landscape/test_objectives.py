"""Landscapes over batches and objectives, against dense derivatives of the loss as written down."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import agree, bound
from tiny import N, cut, images, rng, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lsa.landscape import Landscape, consistency, flatten, objectives
from lsa.landscape.terms import Terms
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


class Endless(IterableDataset):
    """Starts anew at each reading, and has no length."""

    def __init__(self, batches: list) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def sources() -> dict[str, Any]:
    _, x, y = images()
    batches = cut(x, y, 3, 9)
    return {
        "list": batches,
        "loader": DataLoader(TensorDataset(x, y), batch_size=5),
        "iterable": DataLoader(Endless(batches), batch_size=None),
        "numpy": [(a.numpy(), b.numpy()) for a, b in batches],
        "names": [{"x": a, "labels": b} for a, b in batches],
        "a mapping of another kind": [UserDict(x=a, labels=b) for a, b in batches],
    }


class Named(nn.Module):
    """Takes its input by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("name", sources())
def test_batches_of_any_kind_give_the_mean_over_all_samples(name):
    model, x, y = images()
    model = Named(model)
    agree(
        Landscape(model, sources()[name]),
        flatten(model),
        lambda f: F.cross_entropy(f(x), y),
        lambda f: F.cross_entropy(f(x), y, reduction="none"),
    )


class Encoding(UserDict):
    """As the BatchEncoding of Hugging Face: values are attributes, and it moves itself."""

    def __init__(self, data: Any, encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["data"][name]

    def to(self, device: str) -> Encoding:
        return Encoding({k: v.to(device) for k, v in self.data.items()}, self.encodings)


def by_methods(model: nn.Module, batch: Any) -> Terms:
    """An objective for a batch as a tokenizer makes it."""
    batch = batch.to("cpu")
    assert len(batch.encodings) >= len(batch.x)
    each = F.cross_entropy(model(batch.x), batch.labels, reduction="none")
    return Terms(each.sum(), len(each), each)


def test_a_batch_of_a_kind_of_its_own_keeps_its_methods_in_an_objective():
    model, x, y = images()
    data = [Encoding({"x": a, "labels": b}, [*range(len(a))]) for a, b in cut(x, y, 3, 9)]
    landscape = Landscape(model, data, objective=by_methods)
    agree(
        landscape,
        flatten(model),
        lambda f: F.cross_entropy(f(x), y),
        lambda f: F.cross_entropy(f(x), y, reduction="none"),
    )
    assert consistency.notes(landscape, landscape.theta) == ()
    some = torch.tensor([0, 4, 5])
    few = landscape.subset(some)
    assert few.loss(few.theta) == pytest.approx(F.cross_entropy(model(x[some]), y[some]).item())
    nested = [(batch, batch.labels) for batch in data]

    def paired(model: nn.Module, batch: Any) -> Terms:
        assert type(batch[0]) is Encoding
        return by_methods(model, batch[0])

    found = Landscape(model, nested, objective=paired)
    assert found.loss(found.theta) == landscape.loss(landscape.theta)
    assert all(type(batch) is Encoding and len(batch) == 2 for batch in data)  # the caller's own


def test_arrays_are_taken_like_tensors():
    model, x, y = images()
    found = Landscape(model, x.numpy(), y.numpy())
    assert found.loss(flatten(model)) == Landscape(model, x, y).loss(flatten(model))


def test_several_inputs_are_cut_into_batches():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return torch.tanh(self.a(first)) * self.b(second)

    model, (_, x, y) = seeded(Two), images()
    for inputs in ((x, x.flip(0)), {"first": x, "second": x.flip(0)}):
        agree(
            Landscape(model, inputs, y, chunk=4),
            flatten(model),
            lambda f: F.cross_entropy(f(x, x.flip(0)), y),
            lambda f: F.cross_entropy(f(x, x.flip(0)), y, reduction="none"),
        )


def test_weights_of_samples():
    model, x, y = images()
    w = torch.rand(N, generator=rng(5)).double()
    w[3] = 0
    batches = [
        ((a, b), c) for (a, b), c in zip(cut(x, y, 3, 9), w.tensor_split([3, 9]), strict=True)
    ]

    def objective(model: nn.Module, batch: Any) -> Terms:
        pair, weights = batch
        own = objectives.weighted(
            lambda o, t: F.cross_entropy(o, t, reduction="none"), lambda _: weights
        )
        return own(model, pair)

    agree(
        Landscape(model, batches, objective=objective),
        flatten(model),
        lambda f: w @ F.cross_entropy(f(x), y, reduction="none") / w.sum(),
        lambda f: N / w.sum() * w * F.cross_entropy(f(x), y, reduction="none"),
    )


def penalised(model: nn.Module, batch: Any) -> Terms:
    x, y = batch
    each = F.cross_entropy(model(x), y, reduction="none")
    penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
    return Terms(each.sum(), len(each), each, penalty=penalty)


def test_a_penalty_counts_once():
    model, x, y = images()

    def penalty(f: Any) -> Tensor:
        return 0.1 * sum(p.square().sum() for p in f.parameters())

    landscape, theta = Landscape(model, cut(x, y, 3, 9), objective=penalised), flatten(model)
    agree(
        landscape,
        theta,
        lambda f: F.cross_entropy(f(x), y) + penalty(f),
        lambda f: F.cross_entropy(f(x), y, reduction="none") + penalty(f),
    )


def test_samples_that_interact_make_the_batch_the_unit():
    def contrastive(model: nn.Module, batch: Any) -> Terms:
        z = F.normalize(model(batch[0]), dim=1)
        return Terms(F.cross_entropy(z @ z.T * 5, torch.arange(len(z)), reduction="sum"), len(z))

    model, x, y = images()
    batches = cut(x, y, 3, 9)
    landscape, theta = Landscape(model, batches, objective=contrastive), flatten(model)
    assert not landscape.has_samples and landscape.n_samples == 3

    def parts(f: Any) -> list[Tensor]:
        return [contrastive(f, batch).total for batch in batches]

    weights = torch.tensor([3.0, 6.0, 5.0]).double()
    agree(
        landscape,
        theta,
        lambda f: sum(parts(f)) / N,
        lambda f: torch.stack(parts(f)) * 3 / N,
    )
    values = landscape.losses(theta)
    influences = values - landscape.loss(theta) * weights * 3 / N
    torch.testing.assert_close(landscape.influences(values) - landscape.loss(theta), influences)


def test_the_gauss_newton_part_is_that_of_tensors():
    model, x, y = images()
    theta, v = flatten(model), flatten(model).flip(0)
    plain, streamed = Landscape(model, x, y), Landscape(model, cut(x, y, 3, 9))
    for memory in (0, 1 << 30):
        product = streamed.with_memory(memory).gauss_newton(theta)
        for _ in range(2):
            torch.testing.assert_close(product(v), plain.gauss_newton(theta)(v))
    found = streamed.gauss_newton_curvatures(theta, v)
    torch.testing.assert_close(found, plain.gauss_newton_curvatures(theta, v))
    wrong = streamed.per_sample(theta)[1]
    assert wrong is not None and torch.equal(wrong, plain.per_sample(theta)[1])


def test_some_units_of_a_stream_are_those_of_the_tensors():
    model, x, y = images()
    chosen = torch.tensor([12, 1, 4, 5])
    part = Landscape(model, cut(x, y, 3, 9)).subset(chosen)
    kept = chosen.sort().values
    agree(
        part,
        flatten(model),
        lambda f: F.cross_entropy(f(x[kept]), y[kept]),
        lambda f: F.cross_entropy(f(x[kept]), y[kept], reduction="none"),
    )
    assert part.subset(torch.tensor([0, 3])).n_samples == 2


def test_physics_informed_losses_differentiate_by_the_inputs():
    def objective(model: nn.Module, batch: Tensor) -> Terms:
        x = batch.detach().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        each = (slope[:, 0] + u[:, 0] - 1).square()
        return Terms(each.sum(), len(each), each)

    model = seeded(lambda: nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)))
    x = torch.randn(10, 2, generator=rng()).double()
    agree(
        Landscape(model, list(x.split(4)), objective=objective),
        flatten(model),
        lambda f: objective(f, x).total / 10,
        lambda f: objective(f, x).samples,
    )


def test_a_lightning_module_that_optimizes_by_hand_is_refused():
    """Its training_step would step the optimizer of the user."""

    class Module(nn.Linear):
        automatic_optimization = False

        def training_step(self, batch, index):
            raise AssertionError("nothing of it may run")

    with torch.random.fork_rng():
        model = Module(4, 3)
    landscape = Landscape(model, [torch.ones(5, 4)], objective=objectives.lightning())
    with pytest.raises(InputError, match="steps the optimizer itself; give loss= or objective="):
        landscape.loss(landscape.theta)


def test_a_lightning_module_logs_nothing_while_it_is_measured():
    logged: list[str] = []

    class Module(nn.Linear):
        def log(self, name: str, value: object) -> None:
            logged.append(name)

        def log_dict(self, values: dict) -> None:
            logged.extend(values)

        def training_step(self, batch, index):
            loss = self(batch).square().mean()
            self.log("loss", loss)
            self.log_dict({"two": loss})
            return loss

    with torch.random.fork_rng():
        model = Module(4, 3)
    model.log_dict = own = logged.extend  # pyright: ignore[reportAttributeAccessIssue]
    terms = objectives.lightning()(model, torch.ones(5, 4))
    assert terms.weight == 5 and not logged
    assert model.log_dict is own or model.log_dict == own
    model.training_step(torch.ones(5, 4), 0)
    assert logged == ["loss", "two"]


def test_draws_make_a_random_network_one_fixed_function():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(F.dropout(x, 0.5))

    model, (_, x, y) = seeded(Noisy), images()
    landscape, theta = Landscape(model, cut(x, y, 5), draws=3), flatten(model)

    def losses(f: Any) -> Tensor:
        found = []
        for index, (a, b) in enumerate(cut(x, y, 5)):
            with torch.random.fork_rng([]):
                each = []
                for draw in range(3):
                    torch.manual_seed(3 * index + draw)
                    each.append(F.cross_entropy(f(a), b, reduction="none"))
            found.append(torch.stack(each).mean(0))
        return torch.cat(found)

    agree(landscape, theta, lambda f: losses(f).mean(), losses)
    assert landscape.loss(theta) == landscape.loss(theta)


# --- refused --------------------------------------------------------------------------------------


def total(model: nn.Module, batch: Any) -> Terms:
    each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return Terms(each.sum(), len(each), each)


def refused(objective: Any, source: Any = None, line: str = "") -> None:
    model, x, y = images()
    with pytest.raises(InputError, match=line) as error:
        landscape = Landscape(model, source or cut(x, y, 3, 9), objective=objective)
        landscape.gradient(flatten(model))
        landscape.gradient(flatten(model))
    assert "\n" not in str(error.value)


def test_terms_that_do_not_fit_are_refused():
    def made(**changes: Any) -> Any:
        return lambda model, batch: Terms(**{**vars(total(model, batch)), **changes})

    refused(lambda m, b: total(m, b).total, line="returned a Tensor; return lsa.Terms")
    refused(made(total=torch.ones(3)), line=r"total has shape \(3,\)")
    refused(made(samples=torch.ones(3, 2)), line=r"samples has shape \(3, 2\)")
    refused(made(weights=torch.ones(2)), line=r"weights has shape \(2,\)")
    refused(made(weight=0.0), line="sum to 0")
    refused(made(samples=torch.ones(3)), line="Terms.samples add up to")


def test_an_objective_with_tensors_of_its_own_is_refused():
    model, x, y = images()

    def objective(given: nn.Module, batch: Any) -> Terms:
        terms = total(given, batch)
        penalty = sum(p.square().sum() for p in model.parameters())
        return Terms(terms.total, terms.weight, terms.samples, penalty=penalty)

    with pytest.raises(InputError, match="trainable tensors outside θ"):
        Landscape(model, cut(x, y, 3), objective=objective).loss(flatten(model))


def test_weights_that_change_are_refused():
    calls = []

    def objective(model: nn.Module, batch: Any) -> Terms:
        calls.append(1)
        terms = total(model, batch)
        return Terms(terms.total, len(calls), terms.samples)

    refused(objective, line="weights must not depend on θ or on chance")


def test_data_that_change_are_refused():
    _, x, y = images()
    order = torch.Generator().manual_seed(0)
    shuffled = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, generator=order)
    refused(total, shuffled, "shuffle=False")
    refused(total, iter(cut(x, y, 3)), "which can be read only once")
    refused(total, Endless([]), "there is no batch")

    class Shrinks:
        left = 3

        def __iter__(self):
            Shrinks.left -= 1
            return iter(cut(x, y, 3, 9)[: Shrinks.left])

    refused(total, Shrinks(), "differ from one reading to the next")


def test_a_loader_that_shuffles_by_the_global_seed_keeps_one_order():
    model, x, y = images()
    shuffled = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    landscape, theta = Landscape(model, shuffled), flatten(model)
    assert torch.equal(landscape.losses(theta), landscape.losses(theta))
    assert landscape.loss(theta) == pytest.approx(Landscape(model, x, y).loss(theta), rel=1e-12)


def test_bound_gives_the_network_its_parameters():
    model, x, _ = images()
    landscape = Landscape(model, x, torch.zeros(N).long())
    torch.testing.assert_close(bound(landscape, flatten(model))(x), model(x))
