"""Losses and batches of today's tasks: each right to a dense oracle, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from tiny import N, images, rng, seeded
from torch import Tensor, nn
from torch.func import functional_call

import lsa
from lsa.landscape import Landscape, flatten
from lsa.probe import find

pytestmark = [
    pytest.mark.usefixtures("global_rng_untouched"),
    pytest.mark.filterwarnings("ignore"),
]
X = torch.randn(N, 4, generator=rng()).double()
Y = torch.arange(N) % 3
CUTS = ((0, 5), (5, N))
Each = Callable[..., Tensor]  # (network, *batch) ↦ ℓᵢ `(n,)`


class Task(NamedTuple):
    model: nn.Module
    batches: list[Any]
    each: Each | None = None  # losses of samples
    mean: Each | None = None  # loss of a batch whose samples interact, a mean over them


def cut(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tuple(t[i:j] for t in tensors) for i, j in CUTS]


def ids(seed: int, length: int = 5, words: int = 7) -> Tensor:
    return torch.randint(1, words, (N, length), generator=rng(seed))


def mlp(outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)))


def preference() -> Task:
    """DPO (Rafailov et al. 2023): log-likelihood ratios to a reference network."""
    model, reference = (
        seeded(lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))) for _ in range(2)
    )
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.5)

    def log(f: Any, tokens: Tensor) -> Tensor:
        each = f(tokens[:, :-1]).log_softmax(2).gather(2, tokens[:, 1:, None])
        return each.squeeze(2).sum(1)

    def losses(f: Any, chosen: Tensor, rejected: Tensor) -> Tensor:
        with torch.no_grad():
            base = log(reference, chosen) - log(reference, rejected)
        return -F.logsigmoid(0.1 * (log(f, chosen) - log(f, rejected) - base))

    return Task(model, cut(ids(1), ids(2)), losses)


def rewards() -> Task:
    other = torch.randn(N, 4, generator=rng(9)).double()
    return Task(mlp(1), cut(X, other), lambda f, a, b: -F.logsigmoid((f(a) - f(b)).squeeze(1)))


def soft_labels() -> Task:
    """Mixup with label smoothing."""
    mixed = 0.3 * F.one_hot(Y, 3).double() + 0.7 * F.one_hot(Y.flip(0), 3).double()
    options: Any = {"label_smoothing": 0.1, "reduction": "none"}
    return Task(mlp(), cut(X, mixed), lambda f, x, y: F.cross_entropy(f(x), y, **options))


def transducer() -> Task:
    """RNN-T (Graves 2012): all alignments of a label sequence with the frames."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frames, self.labels = nn.Linear(4, 5), nn.Embedding(6, 5)
            self.joint = nn.Linear(5, 6)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            states = self.frames(x)[:, :, None] + self.labels(F.pad(y, (1, 0)))[:, None]
            return self.joint(torch.tanh(states))

    def losses(f: Any, x: Tensor, y: Tensor) -> Tensor:
        p = f(x, y).log_softmax(-1)
        n, frames, labels, _ = p.shape
        ways = {(0, 0): p.new_zeros(n)}
        for t, u in ((t, u) for t in range(frames) for u in range(labels) if t + u):
            last = []
            if t:
                last.append(ways[t - 1, u] + p[:, t - 1, u, 0])
            if u:
                last.append(ways[t, u - 1] + p[torch.arange(n), t, u - 1, y[:, u - 1]])
            ways[t, u] = torch.stack(last).logsumexp(0)
        return -(ways[frames - 1, labels - 1] + p[:, -1, -1, 0])

    x = torch.randn(N, 4, 4, generator=rng()).double()
    return Task(seeded(Network), cut(x, ids(2, 2, 6)), losses)


class Tasks(nn.Module):
    """Two heads, with their weights learned (Kendall et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)
        self.log = nn.Parameter(torch.tensor([0.1, -0.2]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {"classes": self.classes(h), "value": self.value(h).squeeze(1), "log": self.log}


def two_tasks() -> Task:
    def losses(f: Any, x: Tensor, y: Tensor, value: Tensor) -> Tensor:
        out = f(x)
        a, b = (-2 * out["log"]).exp()
        first = F.cross_entropy(out["classes"], y, reduction="none")
        return a * first + b * (out["value"] - value).square() + out["log"].sum()

    return Task(seeded(Tasks), cut(X, Y, X[:, 0].clone()), losses)


def two_towers() -> Task:
    """CLIP (Radford et al. 2021)."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.texts = nn.Linear(4, 3), nn.Embedding(9, 3)
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            a, b = F.normalize(self.images(x), dim=1), self.texts(tokens).mean(1)
            return self.scale.exp() * a @ F.normalize(b, dim=1).T

    def loss(f: Any, x: Tensor, tokens: Tensor) -> Tensor:
        scores, own = f(x, tokens), torch.arange(len(x))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    return Task(seeded(Towers), cut(X, ids(2)), mean=loss)


def balanced_experts() -> Task:
    """A mixture of experts that keeps the loss of its balance as an attribute of itself."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            p = self.gate(x).softmax(1)
            top, rows = p.argmax(1), torch.arange(len(x))
            out = torch.stack([e(x) for e in self.experts], 1)[rows, top] * p[rows, top, None]
            self.kept = 3 * (F.one_hot(top, 3).double().mean(0) * p.mean(0)).sum()
            return out, self.kept

    def loss(f: Any, x: Tensor, y: Tensor) -> Tensor:
        out, balance = f(x)
        return F.cross_entropy(out, y) + 0.1 * balance

    model = seeded(Experts)
    model(X)  # leaves a tensor with a graph, which deepcopy refuses
    return Task(model, cut(X, Y), mean=loss)


def boxes() -> Task:
    """A detector that computes a dictionary of losses from lists of images and of targets."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classes, self.boxes = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 4)

        def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict:
            h = torch.tanh(self.body(torch.stack(images)))
            labels = torch.stack([t["labels"] for t in targets])
            found = torch.stack([t["boxes"] for t in targets])
            return {
                "classes": F.cross_entropy(self.classes(h), labels),
                "boxes": F.smooth_l1_loss(self.boxes(h), found),
            }

    box = torch.randn(N, 4, generator=rng(4)).double()
    targets = [{"labels": y, "boxes": b} for y, b in zip(Y, box, strict=True)]
    batches = [(list(X[i:j]), targets[i:j]) for i, j in CUTS]
    return Task(seeded(Detector), batches, mean=lambda f, *batch: sum(f(*batch).values()))


class Graph(NamedTuple):
    x: Tensor
    edges: Tensor
    y: Tensor


def graphs() -> Task:
    """Nodes of graphs; those of one graph share its edges, and each is a sample."""

    class Propagating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            def spread(h: Tensor) -> Tensor:
                return h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])

            return self.b(spread(torch.tanh(self.a(spread(x)))))

    def losses(f: Any, x: Tensor, edges: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f(x, edges), y, reduction="none")

    edges = [torch.randint(j - i, (2, 20), generator=rng(j)) for i, j in CUTS]
    batches = [Graph(X[i:j], e, Y[i:j]) for (i, j), e in zip(CUTS, edges, strict=True)]
    return Task(seeded(Propagating), batches, losses)


def inner_step() -> Task:
    """MAML (Finn et al. 2017): the loss after a step of gradient descent."""
    model = mlp()

    def loss(f: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            named = dict(f.named_parameters())
            first = F.cross_entropy(functional_call(model, named, x[::2]), y[::2])
            steps = torch.autograd.grad(first, [*named.values()], create_graph=True)
            moved = {k: p - 0.1 * s for (k, p), s in zip(named.items(), steps, strict=True)}
            return F.cross_entropy(functional_call(model, moved, x[1::2]), y[1::2])

    return Task(model, cut(X, Y), mean=loss)


TASKS = (preference, rewards, soft_labels, transducer, two_tasks, two_towers, balanced_experts,
         boxes, graphs, inner_step)  # fmt: skip


def objective_of(task: Task) -> Any:
    def objective(model: nn.Module, batch: Any) -> lsa.Terms:
        if task.each is None:
            assert task.mean is not None
            n = len(batch[0])
            return lsa.Terms(task.mean(model, *batch) * n, n)
        each = task.each(model, *batch)
        return lsa.Terms(each.sum(), len(each), each)

    return objective


@pytest.mark.parametrize("make", TASKS, ids=lambda f: f.__name__)
def test_a_task_is_right(make):
    task = make()
    landscape = Landscape(task.model, task.batches, objective=objective_of(task))
    theta = flatten(task.model)

    def each(f: Any) -> Tensor:
        assert task.each is not None
        return torch.cat([task.each(f, *batch) for batch in task.batches])

    def whole(f: Any) -> Tensor:
        if task.mean is None:
            return each(f).mean()
        sums = [task.mean(f, *batch) * len(batch[0]) for batch in task.batches]
        return torch.stack(sums).sum() / N

    agree(landscape, theta, whole, each if task.each else None)
    assert not landscape.remarks
    assert find("lanczos")(landscape=landscape, theta=theta, k=1, density_probes=0).converged


def test_a_diffusion_loss_by_fixed_draws_of_time_and_noise():
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.a, self.b = nn.Embedding(10, 4), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.b(F.silu(self.a(x + self.time(t))))

    kept = torch.linspace(0.99, 0.05, 10).double()

    def losses(f: Any, x: Tensor) -> Tensor:
        t, noise = torch.randint(10, (len(x),)), torch.randn(len(x), 4).double()
        a = kept[t][:, None]
        return (f(a.sqrt() * x + (1 - a).sqrt() * noise, t) - noise).square().mean(1)

    def objective(model: nn.Module, batch: tuple[Tensor]) -> lsa.Terms:
        each = losses(model, *batch)
        return lsa.Terms(each.sum(), len(each), each)

    def oracle(f: Any) -> Tensor:
        found = []
        for i, (x,) in enumerate(cut(X)):
            with torch.random.fork_rng([]):
                draws = [losses(f, x) for d in range(3) if torch.manual_seed(3 * i + d)]
            found.append(torch.stack(draws).mean(0))
        return torch.cat(found)

    model = seeded(Denoiser)
    landscape = Landscape(model, cut(X), objective=objective, draws=3)
    agree(landscape, flatten(model), lambda f: oracle(f).mean(), oracle)
    random = Landscape(model, cut(X), objective=objective)
    with torch.random.fork_rng([]):  # what it draws is its own
        notes = find("sharpness")(landscape=random, theta=flatten(model), probes=2, starts=1).notes
    assert any("draws random numbers" in note for note in notes)


def test_segmentation_counts_the_pixels_that_are_not_ignored():
    def network() -> nn.Module:
        last = nn.Conv2d(4, 3, 1)
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), last)

    model = seeded(network)
    x = torch.randn(N, 2, 4, 4, generator=rng()).double()
    y = torch.randint(3, (N, 4, 4), generator=rng(1))
    for i in range(N):
        y[i, :, : i % 4] = 255
    y[3] = 255
    counted = (y != 255).sum()

    def each(f: Any) -> Tensor:
        pixels = F.cross_entropy(f(x), y, ignore_index=255, reduction="none")
        return pixels.sum((1, 2)) * N / counted

    landscape = Landscape(model, x, y, nn.CrossEntropyLoss(ignore_index=255), chunk=4)
    agree(landscape, flatten(model), lambda f: each(f).mean(), each)


@pytest.mark.parametrize("way", ["tensors", "batches"])
def test_outputs_may_be_a_tuple_a_dictionary_and_a_number_for_all_samples(way):
    def loss(outputs: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs["classes"], y) + outputs["log"].square().sum()

    def each(f: Any) -> Tensor:
        out = f(X)
        return F.cross_entropy(out["classes"], Y, reduction="none") + out["log"].square().sum()

    model = seeded(Tasks)  # of which a head is not used by this loss
    data = (X, Y) if way == "tensors" else (cut(X, Y),)
    landscape = Landscape(model, *data, loss=loss, chunk=6)
    theta = flatten(model)
    agree(landscape, theta, lambda f: each(f).mean(), each)
    u = torch.randn(len(theta), generator=rng(2)).double()
    G = landscape.gauss_newton(theta)(u)
    parts = landscape.gauss_newton_curvatures(theta, u)
    torch.testing.assert_close(parts.mean(), u @ G)
    for name in ("lanczos", "layers", "sgd_noise"):
        assert find(name)(landscape=landscape, theta=theta, k=1).metrics


def refusals() -> dict[str, tuple[Callable[[], Any], str]]:
    model, x, y = images()

    def dice(o: Tensor, y: Tensor) -> Tensor:
        p, t = o.softmax(1)[:, 1], (y == 1).double()
        return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())

    def closes_over(o: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(other(F.pad(o, (0, 1))), F.one_hot(y, 3).double())

    def to_itself(model: nn.Module, batch: Any) -> lsa.Terms:
        each = (model(batch[0]) - model(batch[0]).detach() / 2).square().sum(1)
        return lsa.Terms(each.sum(), len(each), each)

    def bare(model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])

    other, detector = mlp(), boxes()
    batches = cut(x, y)
    return {
        "a ratio over the batch (dice)": (lambda: Landscape(model, x, y, dice), "no mean over"),
        "a trained network in the loss": (lambda: Landscape(model, x, y, closes_over), "beside"),
        "a target that is detached": (
            lambda: Landscape(model, batches, objective=to_itself), "take a detach\\(\\) away"
        ),
        "batches of another signature": (
            lambda: Landscape(detector.model, detector.batches), "cannot be called with the inputs"
        ),
        "an objective that returns a loss": (
            lambda: Landscape(model, batches, objective=bare), "return lsa.Terms"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_made_right_is_refused_in_one_line(name):
    make, line = refusals()[name]
    with pytest.raises(lsa.InputError, match=line) as caught:
        landscape = make()
        find("lanczos")(landscape=landscape, theta=landscape.theta, k=1, density_probes=0)
    assert "\n" not in str(caught.value)


def test_by_an_inner_step_single_layers_are_refused():
    task = inner_step()
    landscape = Landscape(task.model, task.batches, objective=objective_of(task))
    with pytest.raises(lsa.InputError, match="takes a gradient by parameters that are fixed here"):
        find("layers")(landscape=landscape, theta=landscape.theta, probes=2)
