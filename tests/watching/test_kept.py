"""What modules, functions and sources of batches hold is as before a block."""

from __future__ import annotations

import functools
import random
import threading
from collections import Counter, OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lsa
from lsa.watching.kept import kept, kept_generators
from lsa.watching.undisturbed import undisturbed


def generators() -> dict[str, Any]:
    """One of each kind, with a function that draws from it."""
    return {
        "torch": torch.Generator().manual_seed(0),
        "numpy": np.random.default_rng(0),
        "older numpy": np.random.RandomState(0),
        "python": random.Random(0),
    }


def drawn(of: dict[str, Any]) -> list[float]:
    return [
        float(torch.rand((), generator=of["torch"])),
        float(of["numpy"].random()),
        float(of["older numpy"].rand()),
        of["python"].random(),
    ]


class Holding(nn.Module):
    """A module that keeps something of every kind, and changes all of it in a pass."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("count", torch.zeros(()))
        self.hidden, self.pair = torch.zeros(size), (torch.zeros(size), torch.ones(size))
        self.n, self.seen, self.last = 0, [], deque([1.0], maxlen=1)
        self.table, self.kinds, self.counts = {"a": [0.0]}, {1}, Counter("a")
        self.order, self.array = OrderedDict(a=1.0), np.zeros(2)
        self.generators, self.child = generators(), nn.Tanh()

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """A loss, which hangs on all of them."""
        found = x.detach().mean(0)
        noise = sum(drawn(self.generators)) + self.n + len(self.seen) + float(self.hidden.sum())
        noise += sum(map(float, [*self.pair[0], *self.last, *self.table["a"], *self.kinds]))
        noise += float(self.centre.sum() + self.count) + len(self.table) + self.counts["a"]
        noise += sum(self.order.values()) + float(self.array.sum())
        self.centre = 0.9 * self.centre + found
        self.count += 1
        self.hidden = self.hidden + found
        self.pair[0].add_(found)
        self.n += 1
        self.order["b"], self.array[0] = self.n, self.n
        self.order.move_to_end("a")
        self.seen.append(found)
        self.last.append(float(found.sum()))
        self.table["a"].append(self.n)
        self.table[self.n] = 0
        self.kinds.add(self.n + 7)
        self.counts["a"] += 1
        self.late = found
        return x.square().mean() * (1 + 0.01 * noise)


def after(module: Any) -> list[float]:
    """What three further passes give."""
    return [float(module(torch.ones(2, 3) * i)) for i in (1, 2, 3)]


def holders(module: Holding) -> dict[str, Any]:
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def objective(self, x: Tensor) -> Tensor:
            return self.inner(x)

    owner = SimpleNamespace(module=module)
    owner.call = lambda x: module(x)
    return {
        "module": module,
        "inside": nn.Sequential(module),
        "bound method": Method().objective,
        "closure": lambda model, batch: module(batch),
        "closure of a closure": lsa.objectives.supervised(lambda f, y: module(f)),
        "default": lambda x, m=module: m(x),
        "partial": functools.partial(lambda m, x: m(x), module),
        "object": owner,
    }


@pytest.mark.parametrize("way", holders(Holding()))
def test_modules_hold_what_they_held(way: str):
    module, twin = Holding(), Holding()
    names, seen = [*vars(module)], module.seen
    with kept(holders(module)[way]):
        after(module)
        module.child, module.seen = nn.ReLU(), []
        del module.kinds
        module.child = nn.Tanh()
    assert module.seen is seen and {*vars(module)} == {*names}
    assert after(module) == after(twin)


def test_they_do_so_after_an_error_and_parameters_are_left_alone():
    module = nn.Sequential(Holding(), nn.Linear(3, 2))
    weights = [module[1].weight]
    module.known = weights  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyError), kept(module), torch.no_grad():
        after(module[0])
        module[1].weight.zero_()
        raise KeyError
    assert after(module[0]) == after(Holding())
    assert not module[1].weight.any() and weights[0] is module[1].weight


def test_what_cannot_be_put_back_keeps_nothing_else_from_it():
    module = Holding()
    module.changed = torch.zeros(3)
    with pytest.raises(RuntimeError), kept(module):
        after(module)
        module.changed.resize_(0).add_(1)
    assert after(module) == after(Holding())


NAMED = random.Random()


def drawing() -> Any:
    """A function that draws from a closure, a default and a global."""
    NAMED.seed(0)
    held = generators()
    torchs, numpys = held["torch"], [held["numpy"]][0]

    def inner() -> float:
        return float(torch.rand((), generator=torchs)) + numpys.random()

    def objective(older: Any = held["older numpy"]) -> float:
        return inner() + older.rand() + NAMED.random()

    return objective


def test_generators_that_a_function_holds_or_names_are_kept():
    expected = drawing()()
    objective = drawing()
    with kept(objective):
        assert objective() == expected != objective()
    assert objective() == expected


class Set(torch.utils.data.Dataset):
    """Samples with noise from generators that it holds, some of them in a transform."""

    def __init__(self) -> None:
        self.own = generators()
        self.transforms = [SimpleNamespace(inner=SimpleNamespace(own=generators()))]

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(drawn(self.own) + drawn(self.transforms[0].inner.own)) + i


class Order(torch.utils.data.Sampler):
    """An order by a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __iter__(self):
        return iter(self.rng.permutation(24).tolist())

    def __len__(self) -> int:
        return 24


def loader(way: str) -> torch.utils.data.DataLoader:
    given: dict[str, Any] = {"batch_size": 8, "sampler": Order()}
    if way == "shuffled":
        given = {"batch_size": 8, "shuffle": True, "generator": torch.Generator().manual_seed(0)}
    if way == "batch sampler":
        given = {"batch_sampler": torch.utils.data.BatchSampler(Order(), 8, drop_last=False)}
    rng = random.Random(0)
    if way == "collated":
        given["collate_fn"] = lambda rows: torch.stack(rows) + rng.random()
    data: Any = Set()
    if way == "subset":
        data = torch.utils.data.ConcatDataset([torch.utils.data.Subset(data, range(24))])
    return torch.utils.data.DataLoader(data, **given)


@pytest.mark.parametrize("way", ["plain", "shuffled", "batch sampler", "collated", "subset"])
def test_a_loader_that_is_read_gives_what_it_would_have_given(way: str):
    read, twin = loader(way), loader(way)
    with kept_generators([read] if way == "plain" else read):
        assert len([*read]) == 3
    for _ in range(2):
        assert all(map(torch.equal, [*read], [*twin]))


class Noisy(torch.utils.data.Dataset):
    """Samples with noise from the global state, which each worker has for itself."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        return torch.rand(2) + i


@pytest.mark.parametrize("begun", [False, True])
def test_persistent_workers_go_on_as_if_nothing_had_been_read(begun: bool):
    found = []
    for reads in (False, True):
        made = torch.utils.data.DataLoader(
            Noisy(), batch_size=4, num_workers=1, persistent_workers=True,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        found.append([*made] if begun else [])
        if reads:
            workers = made._iterator
            with kept_generators(made):
                assert len([*made]) == 2
            assert made.persistent_workers and made._iterator is workers
        found[-1] += [*made, *made]
    assert all(map(torch.equal, *found))


class Model(nn.Module):
    """A network with a state that its passes change."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.state = nn.Linear(6, 3), Holding()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs that hang on all passes before."""
        outputs = self.network(x)
        return outputs * self.state(outputs)


@pytest.mark.parametrize("way", ["model", "loss"])
def test_a_watched_training_keeps_what_its_modules_hold(way: str):
    weights = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = Model() if way == "model" else nn.Linear(6, 3)
        state = Holding()
        x, y = torch.randn(24, 6), torch.arange(24) % 3

        class Loss(nn.Module):
            def __init__(self, state=state) -> None:
                super().__init__()
                self.state = state

            def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
                """Cross entropy, with a state."""
                extra = self.state(outputs) if way == "loss" else 0.0
                return F.cross_entropy(outputs, y) + extra

        loss, optimizer = Loss(), torch.optim.SGD(model.parameters(), lr=0.1)

        def objective(model: nn.Module, batch: Any, loss=loss) -> lsa.Terms:
            return lsa.Terms(loss(model(batch[0]), batch[1]) * 12, 12)

        batches = [(x[:12], y[:12]), (x[12:], y[12:])] if measured else None
        options: dict[str, Any] = {"every": 2, "budget": None, "track": False}
        given = {"objective": objective, "measure": ["update"]} if measured else {}
        with lsa.watch(model, optimizer, batches=batches, **given, **options) as watch:
            for i in range(6):
                optimizer.zero_grad()
                loss(model(x[4 * i : 4 * i + 4]), y[4 * i : 4 * i + 4]).backward()
                optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert len(watch.rows) == 6
    assert torch.equal(*weights)


def test_one_thread_measures_at_a_time():
    """Else each would put back what the other has set: flags of torch, random states."""
    entered = threading.Event()

    def measure() -> None:
        with undisturbed():
            entered.set()

    other = threading.Thread(target=measure)
    with undisturbed(), undisturbed():
        other.start()
        assert not entered.wait(0.1)
    assert entered.wait(10)
    other.join()
