"""`python -m benchmarks.transformer_barriers`: the barrier between GPTs of different seeds.

Two small GPTs, one as GPT-2 (layer norms, tied head) and one as Llama (RMS norms, a head of its
own), are trained on this repository's source from several seeds. A seed fixes the initial weights
and the order of the data. The barrier of a pair is measured on held-out text: the greatest height
of the loss on the line between the weights above the line between the two losses. Each pair is
measured three times: as it is, aligned by orders alone, and aligned by all symmetries.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks import gpt
from lsa.landscape import Landscape, objectives
from lsa.landscape.recognition import symmetries
from lsa.maths.alignment.matching import aligned
from lsa.maths.alignment.symmetries import Symmetries
from lsa.maths.paths.polyline import barriers

NETWORKS = {
    "layer norms, tied head": {"norm": nn.LayerNorm, "tied": True},
    "RMS norms, own head": {"norm": nn.RMSNorm, "tied": False},
}
WAYS = ("as they are", "orders alone", "all symmetries")
POINTS = 21


def trained(shape: gpt.Shape, steps: int, seed: int, device: str, **options: object) -> gpt.GPT:
    """One network after AdamW with warm-up and cosine."""
    model = gpt.build(shape, seed, device, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    data = gpt.text(steps * 32, shape.context + 1, shape.vocabulary, 1000 + seed)
    for ids in data.split(32):
        optimizer.zero_grad()
        gpt.mean_loss(model, ids.to(device)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def orders(known: Symmetries) -> Symmetries:
    """Permutations alone."""
    spaces = tuple(
        replace(s, freedom="permutation", norms=tuple(replace(n, folds=False) for n in s.norms))
        for s in known.spaces
    )
    heads = tuple(replace(h, mixes_scores=False, mixes_values=False) for h in known.heads)
    return Symmetries(spaces, heads)


def lines(a: nn.Module, b: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """Loss at every point of the line, `(POINTS,)`, of each way."""
    at = Landscape(a, list(ids.split(32)), objective=objectives.per_token())
    one, other = at.theta, _flat(b)
    known = symmetries(at, one)
    tensors = at.unflatten(one), at.unflatten(other)
    rng = torch.Generator().manual_seed(0)
    ends = [other]
    for chosen in (orders(known), known):
        moved = aligned(chosen, *tensors, rng).tensors
        ends.append(torch.cat([t.reshape(-1) for t in moved.values()]))
    for end in ends:
        alphas = torch.linspace(0, 1, POINTS).tolist()
        yield torch.tensor([at.loss(torch.lerp(one, end, alpha)) for alpha in alphas])


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def interval(values: Tensor) -> str:
    """Mean of the pairs and the 95 % interval of Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5
    return f"{values.mean():.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    shape = gpt.Shape(2, options.width, 4, 64, 128)
    held_out = gpt.text(128, shape.context, shape.vocabulary, 7).to(options.device)
    curves = {}
    print(f"| network | loss | {' | '.join(WAYS)} |\n|---|---|{'---|' * len(WAYS)}")
    for name, made in NETWORKS.items():
        pairs = []
        for seed in range(0, 2 * options.pairs, 2):
            a, b = (
                trained(shape, options.steps, s, options.device, **made) for s in (seed, seed + 1)
            )
            pairs.append(torch.stack(list(lines(a, b, held_out))))
        curves[name] = torch.stack(pairs)  # (pairs, ways, points)
        heights = barriers(curves[name], torch.linspace(0, 1, POINTS)).linear
        ends = curves[name][:, 0][:, [0, -1]].mean(1)
        cells = [interval(heights[:, i]) for i in range(len(WAYS))]
        print(f"| {name} | {interval(ends)} | {' | '.join(cells)} |", flush=True)
    if options.figure:
        draw(curves, options.figure)


def draw(curves: dict[str, Tensor], path: Path) -> None:
    """Loss on the lines of all pairs, one panel for each network."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(11, 4), sharey=True, layout="tight")
    for panel, (name, table) in zip(panels, curves.items(), strict=True):
        for i, way in enumerate(WAYS):
            for j, line in enumerate(table[:, i]):
                label = way if j == 0 else None
                panel.plot(torch.linspace(0, 1, POINTS), line, f"C{i}", lw=1, label=label)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("α, from one network to the other")
    panels[0].set_ylabel("loss per token on held-out text")
    panels[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
