"""Probes on batches and an objective: the numbers of tensors, and notes for what cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import N, images
from torch import Tensor, nn

import lsa
from lsa.landscape import Landscape, flatten
from lsa.probe import Result, find

WEIGHTS = torch.tensor([1.0, 3.0, 2.0]).double()
OPTIONS = {
    "lanczos": {"k": 2, "density_probes": 2, "tol": 1e-8},
    "sgd_noise": {"k": 1, "probes": 2, "tol": 1e-8},
    "layers": {"k": 1, "probes": 2, "tol": 1e-8},
    "sharpness": {"probes": 2, "starts": 1},
    "perturbation": {"points": 5, "tol": 1e-8},
}


def both() -> tuple[Landscape, Landscape, Tensor]:
    """The same weighted loss of tensors and of batches."""
    model, x, y = images()

    def objective(model: nn.Module, batch: Any) -> lsa.Terms:
        inputs, labels = batch
        outputs, w = model(inputs), WEIGHTS[labels]
        each = F.cross_entropy(outputs, labels, WEIGHTS, reduction="none")
        return lsa.Terms(each.sum(), w.sum(), each, w, outputs=outputs)

    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    plain = Landscape(model, x, y, nn.CrossEntropyLoss(WEIGHTS))
    return plain, Landscape(model, batches, objective=objective), flatten(model)


def measured(name: str, landscape: Landscape, theta: Tensor) -> Result:
    return find(name)(landscape=landscape, theta=theta, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_batches_give_the_numbers_of_tensors(name):
    plain, streamed, theta = both()
    wanted, found = measured(name, plain, theta), measured(name, streamed, theta)
    assert found.metrics.keys() == wanted.metrics.keys()
    for key, metric in wanted.metrics.items():
        if key in ("products", "gradients", "adaptive_gradients", "orthogonality_error"):
            continue
        if "split" in key or key == "lambda_max_bias" or "residual" in key or "gap" in key:
            continue  # of random halves, or of rounding
        assert found.metrics[key].value == pytest.approx(metric.value, rel=1e-5, abs=1e-8), key
        for source, error in metric.errors.items():
            assert found.metrics[key].errors[source] == pytest.approx(error, rel=1e-4, abs=1e-8)


def interacting() -> tuple[Landscape, Tensor]:
    model, x, _ = images()

    def objective(model: nn.Module, batch: Tensor) -> lsa.Terms:
        z = F.normalize(model(batch), dim=1)
        loss = F.cross_entropy(5 * z @ z.T, torch.arange(len(z)), reduction="sum")
        return lsa.Terms(loss, len(z))

    return Landscape(model, list(x.split(3)), objective=objective), flatten(model)


@pytest.mark.parametrize("name", ["lanczos", "layers", "sharpness"])
def test_where_samples_interact_errors_are_over_batches_and_a_note_says_so(name):
    landscape, theta = interacting()
    found = measured(name, landscape, theta)
    assert found.metrics["n_samples"].value == -(-N // 3)
    assert any("standard errors are over batches" in note for note in found.notes)
    assert not {"trace_c", "noise_scale", "lambda_c"} & found.metrics.keys()
    if name == "lanczos":
        assert any("Gauss–Newton split is left out" in note for note in found.notes)
        assert found.converged


def test_gradient_noise_needs_samples():
    landscape, theta = interacting()
    with pytest.raises(lsa.InputError, match=r"set Terms\.samples"):
        measured("sgd_noise", landscape, theta)
