"""Losses and batches that once gave a wrong number without a word, or could."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import rng
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import lsa
from lsa.runtime.errors import InputError
from models.float32 import X, Y, dense, loader, mlp, notes, seeded

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


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


def test_parts_that_draw_other_numbers_are_not_blamed_on_the_cut():
    def noisy(model: nn.Module, batch: Any) -> lsa.Terms:
        x, y = batch
        return lsa.Terms(len(y) * F.cross_entropy(model(x + torch.randn_like(x)), y), len(y))

    landscape = lsa.Landscape(mlp(), loader(), objective=noisy, draws=2)
    assert "depends on how they are cut" not in notes(landscape)


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
