"""Small transformers in float64, made in different ways, and text for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpt
from lsa.landscape import Landscape, objectives

WORDS, T = 40, 6
SHAPE = gpt.Shape(layers=2, width=16, heads=4, context=T, vocabulary=WORDS)
IDS = torch.randint(WORDS, (3, T), generator=torch.Generator().manual_seed(0))


class Rotary(nn.Module):
    """Attention with rotary embeddings whose keys and values groups of heads share."""

    def __init__(self, width: int, heads: int, groups: int, *, written_out: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.written_out = heads, groups, written_out
        self.size = width // heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * groups * self.size, bias=False)

    def turned(self, x: Tensor) -> Tensor:
        half = self.size // 2
        rates = 10.0 ** -torch.arange(half, dtype=x.dtype)
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * rates
        a, b = x[..., :half], x[..., half:]
        c, s = angles.cos(), angles.sin()
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q = self.turned(self.q(x).view(n, t, self.heads, self.size).transpose(1, 2))
        k, v = self.kv(x).view(n, t, 2, self.groups, self.size).permute(2, 0, 3, 1, 4)
        r = self.heads // self.groups
        k, v = (y.repeat_interleave(r, 1) for y in (self.turned(k), v))
        if self.written_out:
            scores = q @ k.transpose(2, 3) / self.size**0.5
            mask = torch.ones(t, t, dtype=torch.bool).tril()
            y = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(n, t, width))


class Gated(nn.Module):
    """RMS norms, rotary attention, a gated MLP whose two halves are one weight."""

    def __init__(self, *, tied: bool = False, written_out: bool = False) -> None:
        super().__init__()
        width = SHAPE.width
        self.embedding = nn.Embedding(WORDS, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(5))
        self.attention = nn.ModuleList(
            Rotary(width, 4, 2, written_out=written_out) for _ in range(2)
        )
        self.up = nn.ModuleList(nn.Linear(width, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, width) for _ in range(2))
        self.head = nn.Linear(width, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for i in range(2):
            x = x + self.attention[i](self.norms[2 * i](x))
            gate, up = self.up[i](self.norms[2 * i + 1](x)).chunk(2, -1)
            x = x + self.down[i](F.silu(gate) * up)
        return self.head(self.norms[4](x))


class Encoder(nn.Module):
    """torch's own encoder layers, the norm before each part or behind it."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        width = SHAPE.width
        self.embedding, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        layers = [
            nn.TransformerEncoderLayer(width, 4, 24, batch_first=True, norm_first=before)
            for _ in range(2)
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(ids)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tied head": lambda: gpt.GPT(SHAPE),
    "own head": lambda: gpt.GPT(SHAPE, tied=False),
    "RMS norms": lambda: gpt.GPT(SHAPE, nn.RMSNorm),
    "rotary": Gated,
    "rotary, tied": lambda: Gated(tied=True),
    "rotary, written out": lambda: Gated(written_out=True),
    "encoder": lambda: Encoder(before=True),
    "encoder, norms behind": lambda: Encoder(before=False),
}


def generic(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with gains and biases that are not the initial ones."""
    rng = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return model


def made(name: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return generic(NETWORKS[name](), seed)


def landscape(model: nn.Module, **options: object) -> Landscape:
    return Landscape(model, [IDS], objective=objectives.per_token(), **options)  # pyright: ignore
