"""A GPT with a tied head, and text for it: what language models are measured on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shape(NamedTuple):
    """Of a GPT."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int


SHAPES = {
    "0.4M": Shape(2, 128, 4, 64, 128),
    "0.8M": Shape(4, 128, 4, 128, 128),
    "10.7M": Shape(6, 384, 6, 256, 128),
    "124M": Shape(12, 768, 12, 256, 50_257),
}


class Block(nn.Module):
    """Attention and a hidden layer, each after a layer norm, both added to the stream."""

    def __init__(self, shape: Shape, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.norm_1, self.norm_2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        parts = self.qkv(self.norm_1(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Token ids `(n, T)` ↦ logits `(n, T, C)`."""

    def __init__(
        self, shape: Shape, norm: Callable[[int], nn.Module] = nn.LayerNorm, tied: bool = True
    ) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape, norm) for _ in range(shape.layers))
        self.norm = norm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head reads, `(n, T, width)`."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


def build(shape: Shape, seed: int = 0, device: str = "cpu", **options: Any) -> GPT:
    """A GPT with GPT-2's initial weights, drawn on the device; its options are those of `GPT`."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = GPT(shape, **options)
        for name, p in model.named_parameters():
            if p.ndim == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * shape.layers) ** 0.5 if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
    return model


def text(n: int, length: int, vocabulary: int = 128, seed: int = 0) -> Tensor:
    """Ids `(n, length)` of pieces of this repository's own source, one a character."""
    ids = _source() % vocabulary
    starts = torch.randint(
        len(ids) - length, (n,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return torch.stack([ids[s : s + length] for s in starts])


@functools.cache
def _source() -> Tensor:
    files = sorted((Path(__file__).parent.parent / "lsa").rglob("*.py"))
    joined = "".join(file.read_text(encoding="utf-8") for file in files)
    return torch.tensor([min(ord(c), 127) for c in joined])


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross entropy per token of ids `(n, T + 1)`."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def trained(
    shape: Shape,
    steps: int = 300,
    batch: int = 16,
    seed: int = 0,
    *,
    lr: float = 1e-3,
    device: str = "cpu",
) -> GPT:
    """The same after some steps of AdamW on that text."""
    model = build(shape, seed, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    data = text(max(1, steps * batch), shape.context + 1, shape.vocabulary, seed).to(device)
    for ids in data.split(batch)[:steps]:
        optimizer.zero_grad()
        mean_loss(model, ids).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()
