"""A small transformer on text, character by character: no project, no tracking."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import lsa

TEXT = "".join(f"{a} and {b} make {a + b}. " for a in range(10) for b in range(10))
LENGTH, WIDTH, HEADS = 24, 16, 2
letters = sorted(set(TEXT))
codes = torch.tensor([letters.index(letter) for letter in TEXT])
lines = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)
x, y = lines[:, :-1], lines[:, 1:]  # each sample predicts its next characters


class Transformer(nn.Module):
    """One block: attention to what came before, then a layer of units."""

    def __init__(self) -> None:
        super().__init__()
        self.letter = nn.Embedding(len(letters), WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.units = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(letters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Letters by number (N, T) → scores of the next ones (N, T, letters)."""
        h = self.letter(x) + self.place.weight[: x.shape[1]]
        parts = self.mix(self.before(h)).view(*x.shape, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(*parts, is_causal=True)
        h = h + self.out(seen.transpose(1, 2).flatten(2))
        return self.head(h + self.units(self.between(h)))


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A mean over samples, since all are equally long."""
    return cross_entropy(outputs.flatten(0, 1), targets.flatten())


torch.manual_seed(0)
model = Transformer()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(200):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()

# A landscape takes attention's math kernel by itself: the fused ones lack a second derivative.
landscape = lsa.Landscape(model, x, y, loss)
value = landscape.loss(landscape.theta)
print(f"{len(x)} samples, {landscape.dimension} parameters, loss {value:.4g}")
result = lsa.lanczos(landscape, k=2, density_probes=0)
for name, metric in result.metrics.items():
    errors = "".join(f" ± {error:.2g} ({source})" for source, error in metric.errors.items())
    print(f"{name:24} {metric.value:.4g}{errors} {metric.unit}")
print("\n".join(result.notes))
