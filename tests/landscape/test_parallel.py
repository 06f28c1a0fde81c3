"""FSDP2 and DDP on two gloo processes against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from two_ranks import on_two_ranks

import lsa
from lsa.landscape import Landscape, noise_scale, objectives
from lsa.landscape.parallel import ParallelLandscape
from lsa.maths.spectra import eigenpairs
from lsa.runtime.errors import InputError


class Layers(nn.Module):
    """Token ids ↦ logits, with a tied head and one block."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(13, 16)
        self.block = nn.Sequential(
            nn.LayerNorm(16), nn.Linear(16, 33), nn.GELU(), nn.Linear(33, 16)
        )
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.head(x + self.block(x))


def made() -> tuple[Layers, list[Tensor]]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Layers()
        nn.init.normal_(model.words.weight, std=0.3)
        ids = torch.randint(13, (12, 9))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
        optimizer.zero_grad()
    return model, list(ids.split(4))  # three batches: an odd number


def wrapped(kind: str) -> tuple[nn.Module, list[Tensor]]:
    model, ids = made()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model), ids
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in (model.block, model):
        fully_shard(module, mesh=mesh)
    return model, ids


def measured(kind: str) -> dict[str, Any]:
    model, ids = wrapped(kind)
    training = model.training
    at = ParallelLandscape(model, ids, objectives.per_token())
    theta = at.theta
    before = at.loss(theta)
    rng = torch.Generator().manual_seed(1)
    found = at.extremes(theta, rng, largest=3, smallest=1)
    density = at.density(theta, rng, probes=2, steps=8)
    noise = at.noise_scale(theta)
    assert model.training is training and all(p.grad is None for p in model.parameters())
    return {
        "held": len(theta),
        "dimension": at.dimension,
        "largest": found.largest.values,
        "residuals": found.largest.residuals,
        "smallest": found.smallest.values,
        "trace": (density.trace.value, density.trace.error),
        "noise": noise.trace.value,
        "signal": noise.gradient_squared.value,
        "rise": at.rise(theta, 0.05),
        "directional": at.directional_sharpness(theta),
        "loss": (before, at.loss(theta)),
        "remark": at.remarks["hessian"],
    }


def fsdp() -> dict[str, Any]:
    return measured("fsdp")


def ddp() -> dict[str, Any]:
    return measured("ddp")


@pytest.mark.full
@pytest.mark.parametrize("kind", [fsdp, ddp])
@pytest.mark.filterwarnings("ignore")
def test_two_processes_measure_what_one_does(kind):
    model, ids = made()
    alone = Landscape(model, ids, objective=objectives.per_token(), products="exact")
    theta = alone.theta
    rng = torch.Generator().manual_seed(1)
    start = eigenpairs.start_vector(theta, rng, alone.gradient(theta))
    pairs = eigenpairs.lanczos(alone.hessian(theta), start, rng=rng, largest=3, tol=1e-5)
    g = alone.gradient(theta)
    length = g.double().norm().item()
    each = torch.stack([alone.with_data([batch]).gradient(theta) for batch in ids])
    noise = noise_scale.of_gram(noise_scale.gram(each), 4 * 8, 12 * 8)
    whole = alone.hessian(theta)(torch.eye(len(theta))).trace()
    first, second = on_two_ranks(kind)
    for found in (first, second):
        assert found["dimension"] == len(theta)
        assert torch.allclose(found["largest"], pairs.largest.values, rtol=1e-4)
        assert torch.allclose(found["smallest"], pairs.smallest.values, rtol=1e-4)
        assert (abs(found["largest"] - pairs.largest.values) <= found["residuals"]).all()
        assert found["noise"] == pytest.approx(noise.trace.value, rel=1e-4)
        assert found["signal"] == pytest.approx(noise.gradient_squared.value, rel=1e-4, abs=1e-9)
        rise = alone.loss(theta + 0.05 * g / length) - alone.loss(theta)
        assert found["rise"] == pytest.approx(rise, rel=1e-4)
        directional = (g @ alone.hessian(theta)(g)).item() / length**2
        assert found["directional"] == pytest.approx(directional, rel=1e-4)
        assert found["loss"][0] == found["loss"][1] == pytest.approx(alone.loss(theta), rel=1e-6)
        value, error = found["trace"]
        assert abs(value - whole) < 4 * error
        assert "differences of gradients" in found["remark"]
    held = [found["held"] for found in (first, second)]
    if kind is fsdp:
        assert sum(held) == len(theta) and max(held) < 0.6 * len(theta)
    assert torch.equal(first["largest"], second["largest"])


def tensor_parallel() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 2, bias=False))
    ways = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), ways)
    try:
        ParallelLandscape(model, [torch.ones(3, 4)], objectives.supervised())
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_tensor_parallelism_is_refused_where_it_splits_every_parameter():
    """Its processes compute the same batch; taken for FSDP2's they would give a wrong loss."""
    assert all("tensor parallelism" in line for line in on_two_ranks(tensor_parallel))


def test_without_processes_it_is_refused():
    model, ids = made()
    with pytest.raises(InputError, match="there is no process group"):
        ParallelLandscape(model, ids, objectives.per_token())
    assert lsa.InputError is InputError
