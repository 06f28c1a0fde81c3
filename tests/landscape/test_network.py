"""What a network is left with after a pass, and how one that fails is told."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import rng, seeded
from torch import Tensor, nn

import lsa
from lsa.runtime.errors import InputError

X = torch.randn(10, 4, generator=rng()).double()
Y = torch.arange(10) % 3


class Statistics(nn.Module):
    """Batch norm by the samples in hand always, which writes the means that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("variance", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        h = F.batch_norm(self.first(x), self.mean, self.variance, training=True)  # pyright: ignore
        return self.last(h)


def test_sparse_buffers_are_looked_at_by_nobody():
    model = seeded(lambda: nn.Linear(4, 3)).double()
    model.register_buffer("mask", torch.zeros(4).to_sparse())
    landscape = lsa.Landscape(model, [(X, Y)], copy=False)
    assert math.isfinite(landscape.loss(landscape.theta))


def test_statistics_that_a_function_writes_are_put_back():
    model = seeded(Statistics)
    landscape = lsa.Landscape(model, [(X, Y)], copy=False)
    theta = landscape.theta
    landscape.gradient(theta)
    landscape.hessian(theta)(theta)
    assert [b.unique().tolist() for b in model.buffers()] == [[0.0], [1.0]]
    notes = lsa.lanczos(landscape, k=1, density_probes=0).notes
    assert any("changes its buffer 'mean'" in note for note in notes)
    assert [b.unique().tolist() for b in model.buffers()] == [[0.0], [1.0]]


class Overwrites(nn.Module):
    """Writes into what its gradient needs, so that no training is possible either."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h.mul_(2)
        return self.last(h)


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize(
    ("make", "x", "line"),
    [
        (lambda: nn.Linear(5, 3), X, "cannot be evaluated.*shapes cannot be multiplied"),
        (lambda: nn.Linear(4, 3), X.long(), "cannot be evaluated.*must have the same dtype"),
        (Overwrites, X, "cannot be differentiated.*modified by an inplace operation"),
    ],
)
def test_an_error_of_the_network_is_told_in_one_line(make, x, line, batches):
    data = ([(x, Y)],) if batches else (x, Y)
    with pytest.raises(InputError, match=line) as told:
        lsa.lanczos(lsa.Landscape(seeded(make), *data), k=1)
    assert told.value.__cause__ is not None  # torch's own traceback is not lost


@pytest.mark.parametrize("model", [None, "gpt2", nn.Linear, lambda x: x])
def test_what_is_no_network_is_refused(model):
    with pytest.raises(InputError, match="give a network, an instance of"):
        lsa.Landscape(model, X, Y)


def test_inputs_without_samples_are_refused():
    with pytest.raises(InputError, match="inputs are one number"):
        lsa.Landscape(seeded(lambda: nn.Linear(4, 3)), X.sum(), Y)
    with pytest.raises(InputError, match="hold no tensors"):
        lsa.Landscape(seeded(lambda: nn.Linear(4, 3)), X.tolist(), Y.tolist())


class Router(nn.Module):
    """Converts its own layer in every pass, as that of Switch Transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, 5), nn.Linear(5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.gate = self.gate.to(torch.float32)
        return self.last(h * torch.sigmoid(self.gate(h.float())).to(h.dtype))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_layer_that_converts_itself_is_measured_in_its_own_precision():
    x = X.float()
    landscape = lsa.Landscape(seeded(Router).float(), x, Y)
    found = lsa.lanczos(landscape, k=1, k_min=0, density_probes=0)
    assert any("converts its own parameter 'gate.weight'" in note for note in found.notes)
    model = seeded(Router).float()
    parameters = [*model.parameters()]
    F.cross_entropy(model(x), Y).backward()
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    torch.testing.assert_close(landscape.gradient(landscape.theta), gradient)
    with pytest.raises(InputError, match="converts its own parameter 'gate"):
        lsa.lanczos(lsa.Landscape(seeded(Router), X, Y), k=1)
