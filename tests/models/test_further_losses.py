"""More losses of today's tasks: each right to a dense oracle, or refused in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from tiny import N, rng, seeded
from torch import Tensor, nn

import lsa
from lsa.landscape import Landscape
from lsa.probe import find

pytestmark = [
    pytest.mark.usefixtures("global_rng_untouched"),
    pytest.mark.filterwarnings("ignore"),
]
X = torch.randn(N, 4, generator=rng()).double()
Y = torch.arange(N) % 3
REAL = torch.randn(N, 3, generator=rng(5)).double()
IDS = torch.randint(1, 9, (N, 6), generator=rng(2))
FLAGS = torch.arange(6)[None] < 2 + torch.arange(N)[:, None] % 5  # of ragged length
CUTS = ((0, 5), (5, N))
Loss = Callable[[Any, Any], Tensor]


class Plain(NamedTuple):
    """Tensors and a loss; the truth is the loss of all samples together."""

    model: nn.Module
    x: Any
    y: Any
    loss: Loss


def mlp(outputs: int = 3, inputs: int = 4) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)))


def each(outputs: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(outputs, y, reduction="none", **options)


def chosen(outputs: Tensor, y: Tensor) -> Tensor:
    """log p of the labels, along the last dimension."""
    return outputs.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)


def words() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)))


class Twins(nn.Module):
    """Two views: the first through a trained branch, the second through one that stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.head, self.target = mlp(), mlp(3, 3), mlp().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            kept = F.normalize(self.target(b), dim=1)
        return F.normalize(self.head(self.online(a)), dim=1), kept


class Queue(nn.Module):
    """Contrastive with a queue of negatives (He et al. 2020), which a pass may write."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.writes = mlp(), mlp().requires_grad_(False), writes
        negatives = F.normalize(torch.randn(6, 3, generator=rng(3)).double(), dim=1)
        self.register_buffer("queue", negatives)

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self.query(x), dim=1)
        with torch.no_grad():
            k = F.normalize(self.key(x + 0.1), dim=1)
        own, others = (q * k).sum(1, keepdim=True), q @ self.queue.clone().T
        if self.writes:
            self.queue.copy_(torch.cat([k, self.queue])[:6])
        return torch.cat([own, others], 1) / 0.2


class Three(nn.Module):
    """One network for an anchor and two others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(self.body, inputs))


class Flow(nn.Module):
    """A coupling and a linear map, with the logarithm of the determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(2, 4)
        self.map = nn.Parameter(torch.randn(4, 4, generator=rng(2)) + 3 * torch.eye(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.shift(x[:, :2]).split(2, 1)
        z = torch.cat([x[:, :2], x[:, 2:] * scale.tanh().exp() + shift], 1)
        volume = scale.tanh().sum(1) - torch.linalg.slogdet(self.map)[1]
        return torch.linalg.solve(self.map, z.T).T, volume


class Ode(nn.Module):
    """Two steps of Runge and Kutta."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.head = mlp(4), seeded(lambda: nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            a = self.field(x)
            b = self.field(x + a / 4)
            c = self.field(x + b / 4)
            x = x + (a + 2 * b + 2 * c + self.field(x + c / 2)) / 12
        return self.head(x)


class Chain(nn.Module):
    """Scores of tags and of their transitions, for a conditional random field."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.moves = nn.Parameter(torch.randn(3, 3, generator=rng(2)))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.words(ids)), self.moves


def chain_loss(outputs: Any, y: Any) -> Tensor:
    (scores, moves), (tags, flags) = outputs, y
    ways, own = scores[:, 0], scores[:, 0].gather(1, tags[:, :1])[:, 0]
    for t in range(1, scores.shape[1]):
        there = flags[:, t]
        after = (ways[:, :, None] + moves).logsumexp(1) + scores[:, t]
        ways = torch.where(there[:, None], after, ways)
        step = scores[:, t].gather(1, tags[:, t : t + 1])[:, 0] + moves[tags[:, t - 1], tags[:, t]]
        own = own + torch.where(there, step, 0.0)
    return (ways.logsumexp(1) - own).mean()


class Smoothed(nn.Module):
    """Words to words, by attention of torch, with its outputs as cross entropy takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.body = nn.Transformer(4, 2, 1, 1, 8, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1]).double()
        states = self.body(self.words(source), self.words(target), tgt_mask=mask)
        return self.head(states).transpose(1, 2)


def ppo(outputs: Tensor, y: Any) -> Tensor:
    actions, before, advantages = y
    ratio = (chosen(outputs, actions) - before).exp()
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    p = outputs.log_softmax(1)
    return -clipped.mean() + 0.01 * (p.exp() * p).sum(1).mean()


def pinball(outputs: Tensor, y: Tensor) -> Tensor:
    q = torch.tensor([0.1, 0.5, 0.9]).double()
    over = y[:, None] - outputs
    return torch.maximum(q * over, (q - 1) * over).mean()


def distilled(outputs: Tensor, y: Any) -> Tensor:
    teacher, labels = y
    p = (outputs / 2).log_softmax(1)
    soft = F.kl_div(p, (teacher / 2).softmax(1), reduction="batchmean")
    return 4 * soft + 0.3 * F.cross_entropy(outputs, labels)


def sequences(outputs: Tensor, y: Any) -> Tensor:
    """GRPO (Shao et al. 2024): the mean over sequences of their own means over tokens."""
    ids, flags, advantages = y
    own = chosen(outputs, ids) * flags
    return -(own.sum(1) / flags.sum(1) * advantages).mean()


ADVANTAGES = torch.randn(N, generator=rng(7)).double()
BEFORE = chosen(REAL, Y)
SHORT = IDS * FLAGS
NOTHING = torch.zeros(N)


def tasks() -> dict[str, Plain]:
    smoothed = nn.CrossEntropyLoss(
        ignore_index=0, label_smoothing=0.1, weight=torch.linspace(0.5, 2, 9).double()
    )
    return {
        "knowledge distillation": Plain(mlp(), X, (2 * REAL, Y), distilled),
        "contrastive with a queue": Plain(Queue(), X, torch.zeros(N).long(), F.cross_entropy),
        "policy gradient, clipped (PPO)": Plain(mlp(), X, (Y, BEFORE, ADVANTAGES), ppo),
        "policy gradient, sequences (GRPO)": Plain(
            words(), IDS, (IDS, FLAGS, ADVANTAGES), sequences
        ),
        "quantile regression": Plain(mlp(), X, REAL[:, 0], pinball),
        "seq2seq, smoothed, ignored, weighted": Plain(
            seeded(Smoothed), (IDS, SHORT[:, :-1]), SHORT[:, 1:], smoothed
        ),
        "two views (BYOL)": Plain(
            Twins(), (X, X + 0.1), NOTHING, lambda o, y: (2 - 2 * (o[0] * o[1]).sum(1)).mean()
        ),
        "triplets": Plain(
            Three(), (X, X + 0.2, X.flip(0)), NOTHING, lambda o, y: F.triplet_margin_loss(*o)
        ),
        "a flow": Plain(
            seeded(Flow), X, NOTHING, lambda o, y: (o[0].square().sum(1) / 2 - o[1]).mean()
        ),
        "an ordinary differential equation": Plain(Ode(), X, Y, F.cross_entropy),
        "a conditional random field": Plain(
            seeded(Chain), IDS, (IDS % 3, FLAGS), chain_loss
        ),
        "mean and variance": Plain(
            mlp(2), X, REAL[:, 0],
            lambda o, y: F.gaussian_nll_loss(o[:, 0], y, F.softplus(o[:, 1])),
        ),
        "targets that are flags": Plain(
            mlp(1), X, Y == 1,
            lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.double()),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", tasks())
def test_a_loss_of_tensors_is_right(name):
    model, x, y, loss = tasks()[name]
    landscape = Landscape(model, x, y, loss, chunk=4)
    inputs = x if isinstance(x, tuple) else (x,)
    dense = "seq2seq" not in name
    agree(landscape, landscape.theta, lambda f: loss(f(*inputs), y), dense=dense, rounding=1e-8)
    result = find("lanczos")(landscape=landscape, theta=landscape.theta, k=1, density_probes=0)
    assert result.converged and not any("checked" in note for note in result.notes)


def test_a_queue_that_a_pass_writes_is_put_back_and_said():
    y = torch.zeros(N).long()
    still, writing = (Landscape(Queue(w), X, y, chunk=4) for w in (False, True))
    found, expected = (
        find("lanczos")(landscape=at, theta=at.theta, k=1, density_probes=0)
        for at in (writing, still)
    )
    assert found["lambda_max"].value == pytest.approx(expected["lambda_max"].value, rel=1e-9)
    assert any("'queue', which is put back" in note for note in found.notes)


class Packed(nn.Module):
    """Several texts in one row; a position of 0 begins the next."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 9)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        text = (places == 0).cumsum(1)
        T = ids.shape[1]
        mask = (text[:, :, None] == text[:, None]) & torch.ones(T, T).tril().bool()
        q, k, v = self.qkv(self.words(ids) + self.places(places)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Graphs:
    """Graphs in one object with attributes, which is no container of tensors."""

    def __init__(self, seed: int, n: int) -> None:
        self.x = torch.randn(3 * n, 4, generator=rng(seed)).double()
        self.edges = torch.stack([torch.arange(3 * n), torch.arange(3 * n) // 3 * 3])
        self.of, self.y = torch.arange(n).repeat_interleave(3), torch.arange(n) % 3

    def to(self, device: Any) -> Graphs:
        return self


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, g: Graphs) -> Tensor:
        h = torch.tanh(self.a(g.x))
        h = h + torch.zeros_like(h).index_add_(0, g.edges[1], h[g.edges[0]])
        return self.b(torch.zeros(len(g.y), 5).to(h).index_add_(0, g.of, h))


Sums = Callable[..., tuple[Tensor, Tensor]]  # (network, *batch) ↦ sums and weights of samples


class Task(NamedTuple):
    """Batches, and sums and weights of each sample; with draws by torch's random numbers."""

    model: nn.Module
    batches: list[tuple]
    sums: Sums
    draws: int = 0


def cut(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tuple(t[i:j] for t in tensors) for i, j in CUTS]


def packed() -> Task:
    places = torch.stack([torch.cat([torch.arange(k), torch.arange(6 - k)]) for k in range(1, 6)])
    places = places[torch.arange(N) % 5]
    labels = IDS.masked_fill(places == 0, -100)

    def sums(f: Any, ids: Tensor, places: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        scores = f(ids, places)[:, :-1].transpose(1, 2)
        return each(scores, labels[:, 1:]).sum(1), (labels[:, 1:] != -100).sum(1)

    return Task(seeded(Packed), cut(IDS, places, labels), sums)


def graph_objects() -> Task:
    def sums(f: Any, g: Graphs) -> tuple[Tensor, Tensor]:
        return each(f(g), g.y), torch.ones(len(g.y))

    return Task(seeded(Pooling), [(Graphs(1, 3),), (Graphs(2, 4),)], sums)


def masked_words() -> Task:
    """Words hidden at random: each draw has other words, and another number of them."""

    def sums(f: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.rand(ids.shape) < 0.3
        losses = each(f(ids.masked_fill(hidden, 0)).transpose(1, 2), ids)
        return (losses * hidden).sum(1), hidden.sum(1)

    return Task(words(), cut(IDS), sums, draws=3)


def penalised_critic() -> Task:
    """WGAN-GP (Gulrajani et al. 2017): slopes at random points between two samples."""

    def sums(f: Any, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.rand(len(x), 1).double()
        between = (share * x + (1 - share) * z).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(f(between).sum(), between, create_graph=True)
        losses = (f(z) - f(x))[:, 0] + 10 * (slope.norm(dim=1) - 1).square()
        return losses, torch.ones(len(x))

    return Task(mlp(1), cut(X, X.flip(0)), sums, draws=2)


def scores() -> Task:
    """Score matching (Hyvärinen 2005), by second derivatives along the inputs."""

    def sums(f: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            (s,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
            columns = [torch.autograd.grad(c.sum(), x, create_graph=True)[0] for c in s.T]
        trace = torch.stack([c[:, i] for i, c in enumerate(columns)]).sum(0)
        return trace + s.square().sum(1) / 2, torch.ones(len(x))

    return Task(mlp(1), cut(X), sums)


@pytest.mark.parametrize(
    "make",
    [packed, graph_objects, masked_words, penalised_critic, scores],
    ids=lambda f: f.__name__,
)
def test_an_objective_is_right(make):
    model, batches, sums, draws = make()

    def objective(network: nn.Module, batch: Any) -> lsa.Terms:
        parts = sums(network, *(batch if isinstance(batch, tuple) else (batch,)))
        return lsa.Terms(parts[0].sum(), parts[1].sum(), *parts)

    def parts(f: Any) -> tuple[Tensor, Tensor]:
        """Sums and weights of all samples; means over the draws."""
        found = []
        for i, batch in enumerate(batches):
            with torch.random.fork_rng([]):
                drawn = [
                    sums(f, *batch) for d in range(max(draws, 1))
                    if torch.manual_seed(draws * i + d)
                ]  # fmt: skip
            found.append([torch.stack(p).double().mean(0) for p in zip(*drawn, strict=True)])
        return tuple(torch.cat(p) for p in zip(*found, strict=True))

    def whole(f: Any) -> Tensor:
        totals, weights = parts(f)
        return totals.sum() / weights.sum()

    def samples(f: Any) -> Tensor:
        totals, weights = parts(f)
        return len(totals) * totals / weights.sum()

    given = [batch[0] if isinstance(batch[0], Graphs) else batch for batch in batches]
    landscape = Landscape(model, given, objective=objective, draws=draws)
    agree(landscape, landscape.theta, whole, samples)
    result = find("lanczos")(landscape=landscape, theta=landscape.theta, k=1, density_probes=0)
    assert result.converged
    assert not any("depends on the others" in note for note in result.notes)


def test_with_draws_samples_that_a_layer_mixes_are_told_from_random_numbers():
    class Mixup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(0.6 * x + 0.4 * x[torch.randperm(len(x))])

    landscape = Landscape(Mixup(), cut(X, Y), draws=4)
    notes = find("lanczos")(landscape=landscape, theta=landscape.theta, k=1).notes
    assert any("depends on the others of its batch" in note for note in notes)


class Straight(nn.Module):
    """Networks whose gradient is not that of their loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(4, 5), nn.Linear(5, 3), kind
        self.codes = nn.Parameter(torch.randn(6, 5, generator=rng(4)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        if self.kind == "codes":
            nearest = self.codes[torch.cdist(z, self.codes).argmin(1)]
            z = z + (nearest - z).detach()
        elif self.kind == "gumbel":
            z = F.gumbel_softmax(z, hard=True)
        elif self.kind == "equilibrium":  # one step with a gradient from a fixed point without
            with torch.no_grad():
                h = z
                for _ in range(30):
                    h = torch.tanh(h @ self.codes[:5] / 8 + z)
            z = torch.tanh(h @ self.codes[:5] / 8 + z)
        return self.b(z)


class Balanced(nn.Module):
    """Experts, and the loss of their balance: one number for all samples of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.Linear(4, 9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.gate(x).softmax(1)
        mixed = (self.experts(x).view(len(x), 3, 3) * p[..., None]).sum(1)
        return mixed, p.mean(0).square().sum()


def covariances(o: Tensor, y: Tensor) -> Tensor:
    """VICReg's terms of a batch (Bardes et al. 2022)."""
    centred = o - o.mean(0)
    C = centred.T @ centred / max(1, len(o) - 1)
    return F.relu(1 - (C.diagonal() + 1e-4).sqrt()).mean() + (C - C.diag().diag()).square().sum()


def hardest(o: Tensor, y: Tensor) -> Tensor:
    apart, same = torch.cdist(o, o), y[:, None] == y[None]
    return F.relu((apart * same).amax(1) - (apart + 1e3 * same).amin(1) + 1).mean()


def hazards(o: Tensor, y: Any) -> Tensor:
    """Cox's partial likelihood."""
    times, seen = y
    h = o[times.argsort(descending=True), 0]
    return -((h - h.logcumsumexp(0)) * seen[times.argsort(descending=True)]).sum() / len(h)


def normalised(o: Tensor, y: Any) -> Tensor:
    actions, advantages = y
    scaled = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    return -(chosen(o, actions) * scaled).mean()


def by_variance(o: Tensor, y: Tensor) -> Tensor:
    """β-NLL (Seitzer et al. 2022), whose weights are detached."""
    v = F.softplus(o[:, 1]) + 0.1
    return (((y - o[:, 0]).square() / v + v.log()) * v.detach().sqrt()).mean()


def known(o: Tensor, y: Tensor) -> Tensor:
    there = ~y.isnan()
    return ((o - y.nan_to_num())[there] ** 2).mean()


def refusals() -> dict[str, tuple[Plain, str]]:
    missing = REAL.clone()
    missing[::3, 0] = missing[1::2, 2] = float("nan")
    smoothed = {"ignore_index": 0, "label_smoothing": 0.1}
    ordered = ADVANTAGES.sort().values
    gradient, mean = "gradient is not that of the loss", "no mean over"

    def inside(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y, **smoothed)

    def tokens(o: Tensor, y: Any) -> Tensor:
        return -(chosen(o, y[0]) * y[1] * y[2][:, None]).sum() / y[1].sum()

    def by_counts(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y, 1 / torch.bincount(y, minlength=3).clamp_min(1).double())

    def flipped(o: Tensor, y: Tensor) -> Tensor:
        return 0.6 * F.cross_entropy(o, y) + 0.4 * F.cross_entropy(o, y.flip(0))

    def balanced(o: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(o[0], y) + 0.1 * o[1]

    seq2seq = seeded(Smoothed)
    return {
        "smoothing and ignore_index inside of a function": (
            Plain(seq2seq, (IDS, SHORT[:, :-1]), SHORT[:, 1:], inside), mean
        ),
        "advantages normalised in the loss": (Plain(mlp(), X, (Y, ordered), normalised), mean),
        "a mean over tokens (DAPO)": (Plain(words(), IDS, (IDS, FLAGS, ADVANTAGES), tokens), mean),
        "weights by the counts of a batch": (Plain(mlp(), X, Y.sort().values, by_counts), mean),
        "mixup of targets in the loss": (Plain(mlp(), X, Y.sort().values, flipped), mean),
        "targets that are not known": (Plain(mlp(), X, missing, known), mean),
        "hardest pairs of a batch": (Plain(mlp(), X, Y, hardest), mean),
        "covariances of a batch": (Plain(mlp(), X, Y, covariances), mean),
        "hazards": (Plain(mlp(1), X, (REAL[:, 0].abs(), REAL[:, 1] > -0.5), hazards), mean),
        "a balance of experts as an output": (Plain(seeded(Balanced), X, Y, balanced), mean),
        "detached weights": (Plain(mlp(2), X, REAL[:, 0], by_variance), gradient),
        "nearest codes": (
            Plain(seeded(lambda: Straight("codes")), X, Y, F.cross_entropy), gradient
        ),
        "hard choices at random": (
            Plain(seeded(lambda: Straight("gumbel")), X, Y, F.cross_entropy), gradient
        ),
        "an equilibrium by its last step": (
            Plain(seeded(lambda: Straight("equilibrium")), X, Y, F.cross_entropy), "is not"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", refusals())
def test_what_is_no_landscape_is_refused_in_one_line(name):
    (model, x, y, loss), line = refusals()[name]
    with pytest.raises(lsa.InputError, match=line) as caught:
        landscape = Landscape(model, x, y, loss, chunk=4)
        find("lanczos")(landscape=landscape, theta=landscape.theta, k=1, density_probes=0)
    assert "\n" not in str(caught.value)


def test_outputs_of_one_column_say_no_class():
    y = torch.arange(N) % 2

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(o[:, 0], y.double())

    landscape = Landscape(mlp(1), X, y, loss)
    assert math.isnan(landscape.evaluate(landscape.theta).error)
