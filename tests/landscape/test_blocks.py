"""Parts of θ against dense Hessians: queries of a fused layer, adapters, layers by glob."""

from __future__ import annotations

import pytest
import small_transformers
import torch
import torch.nn.functional as F
from small_transformers import IDS, landscape, made
from tiny import seeded
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import gpt
from lsa.landscape import Landscape
from lsa.landscape.blocks import SlicedProduct, blocks, owners, parted

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def dense(model: nn.Module, names: list[str]) -> Tensor:
    """Hessian of the loss per token in the named parameters one behind the other."""
    own = dict(model.named_parameters())

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([own[n].numel() for n in names])
        given = {n: p.view(own[n].shape) for n, p in zip(names, parts, strict=True)}
        logits = functional_call(model, given, (IDS,))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())

    flat = torch.cat([own[n].detach().reshape(-1) for n in names])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, flat)


@pytest.fixture(scope="module")
def fused() -> tuple[nn.Module, Landscape]:
    shape = gpt.Shape(layers=2, width=8, heads=2, context=6, vocabulary=small_transformers.WORDS)
    model = seeded(lambda: small_transformers.generic(gpt.GPT(shape)))
    return model, landscape(model)


def test_queries_keys_and_values_of_a_fused_layer_are_blocks(fused) -> None:
    model, at = fused
    named = parted(at, at.theta, blocks(at.unflatten(at.theta), 0))
    assert list(named)[4:8] == [f"blocks.0.qkv.{k}" for k in ("query", "key", "value")] + [
        "blocks.0.out"
    ]
    of = owners(at, at.theta, named)
    sizes = of.bincount(minlength=len(named)).tolist()
    assert sum(sizes) == at.dimension and sizes[4:7] == [72, 72, 72]
    names = ["blocks.0.qkv.weight", "blocks.0.qkv.bias"]
    whole, part = dense(model, names), at.restricted(at.theta, names)
    # The rows of queries come first, then those of keys, those of values; then their biases.
    for i, kind in enumerate(("query", "key", "value")):
        entries = named[f"blocks.0.qkv.{kind}"].entries
        assert entries is not None
        rows = torch.cat([64 * i + torch.arange(64), 192 + 8 * i + torch.arange(8)])
        assert torch.equal(entries, rows)
        product = SlicedProduct(part.hessian(part.theta), part.theta, entries)
        block = torch.stack([product(v) for v in torch.eye(len(rows)).double()])
        assert (block - whole[rows[:, None], rows]).abs().max() < 1e-10 * whole.abs().max()


@pytest.mark.parametrize("name", ["rotary", "encoder", "own head"])
def test_every_parameter_has_one_block(name: str) -> None:
    at = landscape(made(name))
    named = parted(at, at.theta, blocks(at.unflatten(at.theta), 0))
    kinds = [block.rpartition(".")[2] for block in named]
    fused = {"rotary": 0, "encoder": 2, "own head": 2}[name]  # rotary's queries have a layer
    assert [kinds.count(kind) for kind in ("query", "key", "value")] == [fused] * 3
    sizes = owners(at, at.theta, named).bincount(minlength=len(named))
    assert sizes.min() > 0 and sizes.sum() == at.dimension


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Linear(base.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x))


@pytest.mark.parametrize(
    ("globs", "count"), [(["*.lora_?.*"], 2), (["attention.0.q.*"], 2), ("attention.1.*", 6)]
)
def test_globs_choose_adapters_and_layers(globs: list[str] | str, count: int) -> None:
    model = made("rotary")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = model.get_submodule("attention.1")
        block.o = Adapted(block.get_submodule("o")).double()  # pyright: ignore
    at = landscape(model, parameters=globs)
    names = list(at.unflatten(at.theta))
    assert len(names) == count
    product = at.hessian(at.theta)
    v = torch.randn(at.dimension, generator=torch.Generator().manual_seed(0)).double()
    H = dense(model, names)
    assert (product(v) - H @ v).norm() < 1e-10 * (H @ v).norm()
