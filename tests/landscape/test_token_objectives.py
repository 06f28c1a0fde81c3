"""Objectives over tokens, and those of Hugging Face, against losses as written down."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from tiny import N, cut, ragged, rng, seeded
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten, objectives
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


class Language(nn.Module):
    """A tiny causal model `(n, T)` → `(n, T, C)`, of embeddings, attention and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=h.dtype)
        return self.head(h + self.attend(h, h, h, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("ends", [(), (3, 9), tuple(range(1, N))])
def test_per_token_is_the_mean_over_all_tokens_however_they_are_cut(shift, ends):
    _, _, y = ragged()
    ids = torch.randint(7, y.shape, generator=rng(2))
    model = seeded(Language)
    a, b = (slice(None, -1), slice(1, None)) if shift else (slice(None), slice(None))
    total = (y[:, b] != -100).sum()
    agree(
        Landscape(model, cut(ids, y, *ends), objective=objectives.per_token(shift=shift)),
        flatten(model),
        lambda f: F.cross_entropy(f(ids)[:, a].transpose(1, 2), y[:, b]),
        lambda f: (
            F.cross_entropy(f(ids)[:, a].transpose(1, 2), y[:, b], reduction="none").sum(1)
            * N
            / total
        ),
    )


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_per_token_without_labels_leaves_padding_out_on_either_side(shift, side):
    ids = torch.randint(1, 7, (4, 6), generator=rng(2))
    lengths = torch.tensor([6, 4, 3, 5])
    places = torch.arange(6)
    mask = (places < lengths[:, None]) if side == "right" else (places >= 6 - lengths[:, None])
    model = seeded(Bigrams)
    batch = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
    landscape = Landscape(model, [batch], objective=objectives.per_token(shift=shift))
    texts = [row[keep][None] for row, keep in zip(ids, mask, strict=True)]
    pairs = [(model(t[:, :-1]), t[:, 1:]) if shift else (model(t), t) for t in texts]
    each = [F.cross_entropy(f[0], y[0], reduction="none") for f, y in pairs]
    assert landscape.loss(landscape.theta) == pytest.approx(torch.cat(each).mean().item())
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found, plain = (
        Landscape(model, [b], objective=objectives.per_token(shift=shift)).loss(flatten(model))
        for b in (full, {"input_ids": ids})
    )
    assert found == plain


def test_per_token_takes_logits_in_half_precision_as_numbers_in_float32():
    ids = torch.randint(1, 7, (4, 6), generator=rng(2))
    model = seeded(Bigrams).bfloat16()
    landscape = Landscape(model, [{"input_ids": ids}], objective=objectives.per_token())
    logits = model(ids)[:, :-1].float()
    loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:])
    assert landscape.loss(landscape.theta) == pytest.approx(loss.item(), rel=1e-6)


def test_per_token_refuses_logits_that_do_not_fit_the_labels():
    batch = (IDS, IDS[:, :-1])
    with pytest.raises(InputError, match=r"the logits have shape \(4, 6, 7\), the labels \(4, 5\)"):
        landscape = Landscape(seeded(Bigrams), [batch], objective=objectives.per_token())
        landscape.loss(landscape.theta)


class Output(UserDict):
    """As Hugging Face's: its values are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Bigrams(nn.Module):
    """Logits `(n, T, C)` of the next token from the present one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table(input_ids)


class OwnLoss(nn.Module):
    """A causal model as Hugging Face makes it, which computes its own loss in float32.

    Args:
        auxiliary: Added to the loss.
        told: Named in the output and not added.
        before: Trained tokens before the data, as prompt tuning has.
    """

    def __init__(self, auxiliary: float = 0.0, told: float = 0.0, before: int = 0) -> None:
        super().__init__()
        self.inner, self.auxiliary, self.told = Bigrams(), auxiliary, told
        self.prompt = nn.Parameter(torch.randn(before, 7))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        scores = self.inner(input_ids)
        before = self.prompt.to(scores).expand(len(scores), -1, -1)
        scores = torch.cat([before, scores], 1)
        labels = F.pad(labels, (before.shape[1], 0), value=-100)
        loss = F.cross_entropy(scores[:, :-1].float().transpose(1, 2), labels[:, 1:])
        extra = scores.float().square().mean()
        loss, parts = loss + self.auxiliary * extra, {}
        if self.auxiliary or self.told:
            parts = {"aux_loss": extra}
        return Output(loss=loss, logits=scores, **parts)


IDS = torch.randint(1, 7, (4, 6), generator=torch.Generator().manual_seed(2))


def own_loss(**options: Any) -> tuple[nn.Module, list]:
    return seeded(lambda: OwnLoss(**options)), [{"input_ids": IDS, "labels": IDS}]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_hugging_face_model_in_half_precision(dtype):
    model, data = own_loss()
    model = model.to(dtype)
    landscape = Landscape(model, data, objective=objectives.hf())
    loss = model(**data[0]).loss
    assert landscape.loss(landscape.theta) == pytest.approx(loss.item(), rel=1e-6)
    own = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [*model.parameters()])])
    found = landscape.gradient(landscape.theta)
    assert (found - own).norm() < 2e-2 * own.norm()


@pytest.mark.parametrize("size", [1e-5, 1e-2, 1.0])
def test_an_auxiliary_loss_of_a_hugging_face_model_is_refused_however_small(size):
    model, data = own_loss(auxiliary=size)
    with pytest.raises(InputError, match="contains aux_loss, which is no mean over tokens; leave"):
        Landscape(model, data, objective=objectives.hf()).loss(flatten(model))


def test_an_auxiliary_loss_that_is_no_part_of_the_loss_may_be_told():
    model, data = own_loss(told=1.0)
    landscape = Landscape(model, data, objective=objectives.hf())
    assert landscape.loss(landscape.theta) == pytest.approx(model(**data[0]).loss.item())


def test_trained_tokens_before_the_data_have_no_label():
    model, data = own_loss(before=3)
    landscape = Landscape(model, data, objective=objectives.hf())
    loss = model(**data[0]).loss
    assert landscape.loss(landscape.theta) == pytest.approx(loss.item())
    own = torch.autograd.grad(loss, list(model.parameters()))
    found = landscape.gradient(landscape.theta)
    torch.testing.assert_close(found, torch.cat([g.reshape(-1) for g in own]))


class Segments(nn.Module):
    """Its loss is of logits that it has made larger."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 3, 2, stride=2)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Output:
        logits = self.layer(pixel_values)
        large = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        return Output(loss=F.cross_entropy(large, labels), logits=logits)


def test_logits_that_do_not_fit_the_labels_are_told_in_one_line():
    data = [{"pixel_values": torch.ones(2, 1, 8, 8).double(), "labels": torch.ones(2, 8, 8).long()}]
    line = r"logits \(2, 3, 4, 4\) and labels \(2, 8, 8\) fit no loss that hf\(\) knows"
    model = seeded(Segments)
    with pytest.raises(InputError, match=line) as caught:
        Landscape(model, data, objective=objectives.hf()).loss(flatten(model))
    assert "\n" not in str(caught.value)


def test_a_hugging_face_model_whose_loss_is_not_finite_is_told_so():
    model, data = own_loss()
    with torch.no_grad():
        model.get_parameter("inner.table.weight").fill_(torch.nan)
    with pytest.raises(InputError, match="the loss of OwnLoss is nan, which tells no mean"):
        Landscape(model, data, objective=objectives.hf()).loss(flatten(model))


@pytest.mark.parametrize("chosen", ["head.weight", ["head.*"]])
def test_a_tied_parameter_asked_for_by_its_second_name_is_told_by_its_first(chosen):
    batches = [(IDS, IDS)]
    with pytest.raises(InputError, match=r"head\.weight is tied to embed\.weight: give that name"):
        Landscape(seeded(Language), batches, objective=objectives.per_token(), parameters=chosen)
    model = seeded(Language)
    model.get_parameter("attend.out_proj.bias").requires_grad_(False)
    with pytest.raises(InputError, match=r"out_proj\.bias; choose from embed\.weight, "):
        Landscape(
            model, batches, objective=objectives.per_token(), parameters="attend.out_proj.bias"
        )
