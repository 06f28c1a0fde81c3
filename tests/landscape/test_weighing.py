"""Losses that are no plain mean over samples: right, or refused in one line."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from tiny import N, images, ragged, rng, seeded
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten
from lsa.landscape.weighing import differing
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")
WEIGHTS = torch.tensor([1.0, 6.0, 20.0])


@pytest.mark.parametrize("chunk", [3, N])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=WEIGHTS),
        nn.CrossEntropyLoss(weight=WEIGHTS.double(), label_smoothing=0.1),
        functools.partial(F.cross_entropy, weight=WEIGHTS, ignore_index=1),
        functools.partial(F.cross_entropy, ignore_index=2),
    ],
    ids=["weights", "weights and smoothing", "partial", "ignored"],
)
def test_class_weights_and_ignored_classes_weigh_as_in_one_pass(loss, chunk):
    model, x, y = images()
    partial = isinstance(loss, functools.partial)
    options = loss.keywords if partial else {**vars(loss), "weight": loss.weight}
    weight = options.get("weight")
    weight = torch.ones(3).double() if weight is None else weight.double()
    w = weight[y] * (y != options.get("ignore_index", -100))
    exact = {
        "weight": weight,
        "ignore_index": options.get("ignore_index", -100),
        "label_smoothing": options.get("label_smoothing", 0.0),
    }
    agree(
        Landscape(model, x, y, loss, chunk=chunk),
        flatten(model),
        lambda f: F.cross_entropy(f(x), y, **exact),
        lambda f: F.cross_entropy(f(x), y, **exact, reduction="none") * N / w.sum(),
    )


@pytest.mark.parametrize("chunk", [3, N])
def test_tokens_that_are_ignored_leave_a_mean_over_the_others(chunk):
    model, x, y = ragged()
    total = (y != -100).sum()
    landscape, theta = Landscape(model, x, y, chunk=chunk), flatten(model)
    agree(
        landscape,
        theta,
        lambda f: F.cross_entropy(f(x), y),
        lambda f: F.cross_entropy(f(x), y, reduction="none").sum(1) * N / total,
    )
    assert landscape.losses(theta)[-1] == 0  # nothing counts there, and nothing is nan


def test_nll_loss_and_probabilities_as_targets():
    model, x, y = images()
    log = nn.Sequential(model, nn.LogSoftmax(1))
    agree(
        Landscape(log, x, y, nn.NLLLoss(weight=WEIGHTS), chunk=4),
        flatten(log),
        lambda f: F.nll_loss(f(x), y, WEIGHTS.double()),
    )
    soft = torch.rand(N, 3, generator=rng(3)).double().softmax(1)
    agree(
        Landscape(model, x, soft, chunk=4),
        flatten(model),
        lambda f: F.cross_entropy(f(x), soft),
        lambda f: F.cross_entropy(f(x), soft, reduction="none"),
    )


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(),
        nn.HuberLoss(),
        nn.BCEWithLogitsLoss(),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3.0, 0.5])),
        lambda o, t: ((1 - torch.sigmoid(o)) ** 2 * F.softplus(-o) * t).mean(),
    ],
    ids=["mse", "huber", "bce", "bce with weights", "own"],
)
def test_means_over_samples_are_taken_as_they_are(loss):
    model, x, y = images()
    targets = F.one_hot(y, 3).double()
    agree(
        Landscape(model, x, targets, loss, chunk=4),
        flatten(model),
        lambda f: loss(f(x), targets),
        lambda f: torch.stack([loss(o[None], t[None]) for o, t in zip(f(x), targets, strict=True)]),
    )


def masked(outputs: Tensor, y: Tensor) -> Tensor:
    """A mean over what is not ignored, of which nobody can ask how it weighs."""
    return F.cross_entropy(outputs.transpose(1, 2).reshape(-1, 3), y.reshape(-1))


def contrastive(outputs: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def as_column(outputs: Tensor, y: Tensor) -> Tensor:
    """(N, 1) against (N,) broadcasts to all pairs."""
    return F.mse_loss(outputs[:, :1], y.double())


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "reduction='sum' and is no mean"),
        (functools.partial(F.mse_loss, reduction="sum"), "reduction='sum' and is no mean"),
        (nn.MSELoss(reduction="none"), "reduction='none' and is no mean"),
        (lambda o, y: F.cross_entropy(o, y, reduction="sum"), "no mean over samples"),
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), "no single number"),
        (lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS.double()), "no mean over samples"),
        (contrastive, "no mean over samples"),
        (as_column, "no mean over samples"),
    ],
)
def test_what_is_no_mean_over_samples_is_refused_in_one_line(loss, line):
    model, x, y = images()
    with pytest.raises(InputError, match=line) as refused:
        Landscape(model, x, y, loss).loss(flatten(model))
    assert "\n" not in str(refused.value) and "lsa.Terms" in str(refused.value)


def test_a_mask_inside_of_a_loss_is_seen_in_sorted_data():
    """The first samples are alike in length, so two of them would not show it."""
    model, x, y = ragged()
    x, y = torch.cat([x[:1]] * 40 + [x]), torch.cat([y[:1]] * 40 + [y])
    with pytest.raises(InputError, match="no mean over samples"):
        Landscape(model, x, y, masked, chunk=8).gradient(flatten(model))


def test_a_penalty_that_closes_over_the_model_is_refused():
    model, x, y = images()

    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o, t) + 0.1 * sum(p.square().sum() for p in model.parameters())

    with pytest.raises(InputError, match="trainable tensors beside the network's outputs"):
        Landscape(model, x, y, loss).gradient(flatten(model))


def test_a_loss_with_parameters_of_its_own_is_refused():
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heat = nn.Parameter(torch.tensor(2.0))

        def forward(self, o: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(o / self.heat, t)

    model, x, y = images()
    with pytest.raises(InputError, match="trainable tensors beside"):
        Landscape(model, x, y, Tempered()).loss(flatten(model))


def test_no_weight_at_all_is_refused():
    model, x, y = images()
    with pytest.raises(InputError, match="no target counts"):
        Landscape(model, x, torch.full_like(y, -100))


def test_influences_are_what_a_change_of_a_samples_count_does():
    model, x, y = images()
    landscape = Landscape(model, x, y, nn.CrossEntropyLoss(weight=WEIGHTS), chunk=4)
    theta = flatten(model)
    s = F.cross_entropy(model(x), y, WEIGHTS.double(), reduction="none").detach()
    w = WEIGHTS.double()[y]
    more = torch.zeros(N).double().requires_grad_()
    (((1 + more) @ s) / ((1 + more) @ w)).backward()
    found = landscape.influences(landscape.losses(theta))
    assert more.grad is not None
    torch.testing.assert_close(found - landscape.loss(theta), N * more.grad)
    plain = Landscape(model, x, y)
    losses = plain.losses(theta)
    assert plain.influences(losses) is losses


def test_samples_that_differ_are_the_extremes_of_label_and_length():
    y = torch.zeros(1000, 6).long()
    y[700, 2:] = -100
    y[300] = 7
    assert {0, 999, 700, 300} <= set(differing(y).tolist())


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        (torch.arange(20).int() % 2, r"targets are torch.int32; .* give y.long\(\)"),
        (torch.arange(20.0) % 2, r"targets are torch.float32; .* give y.long\(\)"),
        (torch.arange(20) % 3, r"target 2 is out of range; .* labels are 0 to 1"),
        (torch.arange(20) % 2 - 1, r"target -1 is out of range; .* labels are 0 to 1"),
    ],
)
def test_targets_that_a_cross_entropy_refuses_are_named(targets, line):
    model = seeded(lambda: nn.Linear(3, 2)).float()
    landscape = Landscape(model, torch.randn(20, 3, generator=rng()), targets)
    with pytest.raises(InputError, match=line):
        landscape.loss(landscape.theta)


class Prototypes(nn.Module):
    """Outputs `(n, 4)` and k prototypes `(k, 4)`, which all samples share."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.linear, self.prototypes = nn.Linear(6, 4), nn.Parameter(torch.randn(k, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.prototypes


@pytest.mark.parametrize("k", [4, 7, 8, 10, 12])
@pytest.mark.parametrize("size", [None, 4, 5, 12])
def test_an_output_that_all_samples_share_may_be_as_long_as_they_are(k, size):
    x, y = torch.randn(12, 6, generator=rng(3)).double(), torch.arange(12) % k
    model = seeded(lambda: Prototypes(k))

    def loss(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(-torch.cdist(*outputs), y)

    data = (x, y) if size is None else ([*zip(x.split(size), y.split(size), strict=True)],)
    landscape = Landscape(model, *data, loss=loss)
    scores = -torch.cdist(*model(x))
    each = F.cross_entropy(scores, y, reduction="none")
    assert landscape.loss(landscape.theta) == pytest.approx(each.mean().item())
    torch.testing.assert_close(landscape.losses(landscape.theta), each.detach())
    own = torch.autograd.grad(each.mean(), [*model.parameters()])
    found = landscape.gradient(landscape.theta)
    torch.testing.assert_close(found, torch.cat([g.reshape(-1) for g in own]))
