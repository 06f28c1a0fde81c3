"""Every registered probe on batches: the numbers of the same landscape given as tensors, or a note.

A small transformer by its loss per token, on batches as dictionaries, of unequal lengths; and a
contrastive loss, whose samples interact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_contract import SMALL, run, stepped
from tiny import images, rng, seeded
from torch import Tensor, nn

import lsa
from lsa import objectives, probe
from lsa.landscape import Landscape, flatten

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

N, PART, T, WORDS = 24, 18, 5, 7
IDS = torch.randint(WORDS, (N, T), generator=rng(1))
LABELS = torch.stack([torch.where(torch.arange(T) < 2 + i % 4, IDS[i], -100) for i in range(N)])
# Of random halves or of rounding: they differ between two exact ways as well.
ROUNDING = ("residual", "gap", "orthogonality", "bias", "products", "gradients", "grad_evals")
REFUSED = {"intrinsic_dim": "there is no accuracy"}
REFUSED_INTERACTING = {
    **REFUSED,
    "sgd_noise": r"set Terms\.samples",
    "symmetry_audit": "this needs inputs and targets as tensors",
}


class Language(nn.Module):
    """Logits `(n, T, C)`; or as torch's loss takes them, `(n, C, T − 1)`, of the next token."""

    def __init__(self, *, shifted: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 4), nn.Parameter(torch.zeros(T, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.last, self.shifted = nn.Linear(4, WORDS), shifted

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.last(self.layer(self.words(input_ids) + self.places))
        return logits[:, :-1].transpose(1, 2) if self.shifted else logits


def tensors(start: int, end: int) -> Landscape:
    model = seeded(lambda: Language(shifted=True))
    return Landscape(model, IDS[start:end], LABELS[start:end, 1:])


def batches(start: int, end: int) -> Landscape:
    cuts = [slice(i, min(i + 5, end)) for i in range(start, end, 5)]
    data = [{"input_ids": IDS[cut], "labels": LABELS[cut]} for cut in cuts]
    model = seeded(lambda: Language(shifted=False))
    return Landscape(model, data, objective=objectives.per_token())


def contrastive(start: int, end: int) -> Landscape:
    model, _, _ = images()
    x = torch.randn(N, 4, generator=rng(3)).double()[start:end]

    def objective(model: nn.Module, batch: Tensor) -> lsa.Terms:
        z = F.normalize(model(batch), dim=1)
        loss = F.cross_entropy(5 * z @ z.T, torch.arange(len(z)), reduction="sum")
        return lsa.Terms(loss, len(z))

    return Landscape(model, list(x.split(3)), objective=objective)


def given(make: Any) -> dict[str, Any]:
    """What probes ask for, on landscapes that `make` gives for a range of samples."""
    whole = make(0, N)
    start = flatten(whole.model)

    def descend(rate: float) -> Tensor:
        theta = start
        for _ in range(15):
            theta = theta - rate * whole.gradient(theta)
        return theta

    return {
        "training": whole,
        "landscape": make(0, PART),
        "validation": make(PART, N),
        "theta": descend(0.3),
        "theta_b": descend(0.1),
        "theta_init": start,
        "optimizer": stepped(start, whole),
        "others": {},
        "trajectory": dict,
        "start": None,
        "memory": {},
        "report": lambda done, total, text="": None,
    }


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SMALL, "sharpness", {"probes": 2, "starts": 2, "m": 6})
    monkeypatch.setitem(SMALL, "preconditioned", {"batch_size": 6})
    monkeypatch.setitem(SMALL, "auto_neb", {**SMALL["auto_neb"], "batch_size": N})


@pytest.fixture(scope="module")
def both() -> tuple[dict[str, Any], dict[str, Any]]:
    return given(tensors), given(batches)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.full) if name == "symmetry_audit" else name
        for name in sorted(probe.modules())
    ],
)
def test_the_numbers_of_batches_are_those_of_tensors(name, both):
    if name in REFUSED:
        for place in both:
            with pytest.raises(lsa.InputError, match=REFUSED[name]):
                run(name, place)
        return
    wanted, found = (run(name, place) for place in both)
    assert found.metrics.keys() == wanted.metrics.keys()
    assert found.curves.keys() == wanted.curves.keys()
    for key, metric in wanted.metrics.items():
        if any(part in key for part in ROUNDING):
            continue
        close = {"rel": 1e-5, "abs": 1e-8, "nan_ok": True}
        assert found.metrics[key].value == pytest.approx(metric.value, **close), key
        for source, error in metric.errors.items():
            assert found.metrics[key].errors[source] == pytest.approx(error, **close), key
    for key, curve in wanted.curves.items():
        np.testing.assert_allclose(found.curves[key].y, curve.y, rtol=1e-5, atol=1e-8, err_msg=key)
    assert set(found.notes) == set(wanted.notes)


@pytest.mark.parametrize("name", sorted(probe.modules()))
def test_where_samples_interact_a_probe_runs_or_is_refused_in_one_line(name, interacting):
    if name in REFUSED_INTERACTING:
        with pytest.raises(lsa.InputError, match=REFUSED_INTERACTING[name]):
            run(name, interacting)
        return
    result = run(name, interacting)
    assert all(np.isfinite(metric.value) for metric in result.metrics.values())
    counted = result.metrics.get("n_samples")
    assert counted is None or counted.value == PART // 3  # batches
    missing = set(probe.find(name).headline) - set(result.metrics)
    assert not missing or result.notes, f"no {missing}, and no word about it"


@pytest.fixture(scope="module")
def interacting() -> dict[str, Any]:
    return given(contrastive)


def test_an_elastic_band_takes_the_batches_in_turn(both, monkeypatch):
    monkeypatch.setitem(SMALL, "auto_neb", {**SMALL["auto_neb"], "batch_size": 5})
    result = run("auto_neb", both[1])
    assert any("take the batches in their order" in note for note in result.notes)
    assert result.metrics["path_loss"].value <= result.metrics["linear_max"].value + 1e-9
