"""Is my learning rate too high? Is my batch too small? A small GPT and a CNN, watched.

    python examples/watched_training.py FOLDER

writes watch-rate.png (a GPT at two rates) and watch-batch.png (a CNN at two batch sizes) there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lsa

RATES, BATCHES = (1e-3, 3e-2), (16, 128)
CONTEXT, WIDTH = 24, 48


class GPT(nn.Module):
    """A causal transformer over bytes: ids `(n, T)` → logits `(n, T, 128)`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(128, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), False)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the byte after each."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.layers(x, mask=mask, is_causal=True))


def text() -> Tensor:
    """Rows of source code, `(n, T)`."""
    code = Path(argparse.__file__).read_bytes() + Path(F.__file__).read_bytes()
    return torch.tensor([b for b in code if b < 128]).unfold(0, CONTEXT, CONTEXT // 2)


def gpt(rate: float, steps: int) -> lsa.watching.Watch:
    """Train with AdamW at a constant rate."""
    torch.manual_seed(0)
    model, rows = GPT(), text()
    rows = rows[torch.randperm(len(rows))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    with lsa.watch(
        model,
        optimizer,
        batches=[rows[:32]],
        objective=lsa.objectives.per_token(),
        measure=("update", "sharpness"),
        every=15,
        budget=None,
        track=False,
    ) as watch:
        for _ in range(steps):
            batch = rows[32 + torch.randint(len(rows) - 32, (16,))]
            logits = model(batch)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch.loss(loss)
    return watch


def cnn(size: int, steps: int) -> lsa.watching.Watch:
    """Train with SGD on batches of a size."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x).float().view(-1, 1, 8, 8) / 16, torch.tensor(y)
    order = torch.randperm(len(x))
    probe, rest = order[:512], order[512:]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with lsa.watch(
        model,
        optimizer,
        batches=(x[probe], y[probe]),
        measure=("noise",),
        every=10,
        budget=None,
        track=False,
    ) as watch:
        for _ in range(steps):
            batch = rest[torch.randint(len(rest), (size,))]
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch.loss(loss)
    return watch


def drawn(watches: dict[str, lsa.watching.Watch], panels: dict[str, tuple[str, bool]]) -> Figure:
    """A panel for each number, a line for each training."""
    figure = Figure((4.2 * len(panels), 3.2), layout="constrained", dpi=100)
    for axes, (name, (label, logarithmic)) in zip(
        figure.subplots(1, len(panels)), panels.items(), strict=True
    ):
        for title, watch in watches.items():
            known = watch.history
            known = known[known[name].notna()]
            smooth = (
                known[name].rolling(20, min_periods=1).mean() if name == "loss" else known[name]
            )
            axes.plot(known.step, smooth, label=title, linewidth=1.2)
        if logarithmic:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    return figure


def main(folder: Path, steps: int = 240) -> None:
    """Both figures."""
    rates = {f"rate {rate:g}": gpt(rate, steps) for rate in RATES}
    figure = drawn(
        rates,
        {
            "loss": ("loss, mean of 20 steps", False),
            "critical_factor": ("critical factor", True),
            "threshold_ratio": ("sharpness / threshold", True),
        },
    )
    for axes in figure.axes[1:]:
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    figure.savefig(folder / "watch-rate.png")
    sizes = {f"batch {size}": cnn(size, steps) for size in BATCHES}
    figure = drawn(
        sizes,
        {"loss": ("loss, mean of 20 steps", True), "noise_scale": ("noise scale (samples)", True)},
    )
    for size, colour in zip(BATCHES, ("tab:blue", "tab:orange"), strict=True):
        figure.axes[1].axhline(size, color=colour, linewidth=0.8, linestyle="--")
    figure.savefig(folder / "watch-batch.png")
    for title, watch in (rates | sizes).items():
        last = watch.history.ffill().iloc[-1]
        names = ("loss", "critical_factor", "threshold_ratio", "noise_scale")
        print(title, *(f"{name} {last[name]:.3g}" for name in names if name in last))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
