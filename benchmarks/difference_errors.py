"""`python -m benchmarks.difference_errors`: the error of products from gradients, by network.

Against exact products in float64, along the gradient, Lanczos vectors 1, 5 and 20, the top
eigenvector and a random vector: the error by the size ε of the step, the step that is chosen, its
true and its stated error, and those of Richardson's extrapolation.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpt, setting
from lsa.landscape import Landscape, objectives
from lsa.maths.differences import Differences
from lsa.maths.spectra import eigenpairs
from lsa.maths.spectra.krylov import Krylov
from lsa.runtime.errors import InputError

STEPS = [10 ** (e / 2) for e in range(-10, -1)]
SHAPE = gpt.SHAPES["0.4M"]


class Case(NamedTuple):
    """One network along one direction."""

    network: str
    direction: str
    errors: list[float]  # relative, by `STEPS`
    step: float  # chosen; nan: refused
    plain: tuple[float, float]  # true and stated error
    richardson: tuple[float, float]


def networks() -> Iterator[tuple[str, Landscape]]:
    """The five networks."""
    ids = list(gpt.text(16, SHAPE.context, seed=7).split(16))
    for name, model in (("trained", gpt.trained(SHAPE)), ("untrained", gpt.build(SHAPE).eval())):
        yield f"GPT {name}", Landscape(model, ids, objective=objectives.per_token())
    x, y = setting.images(None, 256)
    x = F.interpolate(x, size=8)
    for name, act, pool, epochs in (
        ("GELU, average pooling", nn.GELU, nn.AvgPool2d, 60),
        ("ReLU, max pooling", nn.ReLU, nn.MaxPool2d, 60),
        ("ReLU, max pooling, untrained", nn.ReLU, nn.MaxPool2d, 0),
    ):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(3, 16, 3, padding=1), act(), pool(2),
                nn.Conv2d(16, 32, 3, padding=1), act(), pool(2),
                nn.Flatten(), nn.Linear(128, 64), act(), nn.Linear(64, 10),
            )  # fmt: skip
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        yield name, Landscape(model, x, y)


def directions(exact: Landscape, at: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Unit vectors in float64."""
    rng = torch.Generator().manual_seed(0)
    gradient = exact.gradient(at)
    krylov = Krylov(eigenpairs.start_vector(at, rng, gradient), 32)
    matvec = exact.hessian(at, exact=True)
    for _ in range(24):
        krylov.multiply(matvec)
    ritz = krylov.ritz((1, 1))
    top = krylov.vectors(ritz.S[:, ritz.ends])
    yield "gradient", gradient / gradient.norm()
    for i in (1, 5, 20):
        yield f"Lanczos vector {i}", krylov.V[i]
    yield "top eigenvector", top[:, 0]
    yield "bottom eigenvector", top[:, 1]
    random = torch.randn(len(at), generator=rng, dtype=torch.float64)
    yield "random", random / random.norm()


def cases() -> Iterator[Case]:
    """All networks and directions."""
    for name, at in networks():
        theta, double = at.theta, at.double()
        matvec = double.hessian(theta.double(), exact=True)
        for label, v in directions(double, theta.double()):
            exact, u = matvec(v), v.float()

            def off(value: Tensor, exact: Tensor = exact) -> float:
                return float((value.double() - exact).norm() / exact.norm())

            errors = [
                off((at.gradient(theta + s * u) - at.gradient(theta - s * u)) / (2 * s))
                for s in STEPS
            ]
            differences = Differences(at.gradient, theta, name="Hv")
            found: list[Any] = []
            for measure in (differences.derivative, differences.measured):
                try:
                    value, error = measure(u)
                    found.append((off(value), error / float(exact.norm())))
                except InputError:
                    found.append((float("nan"), float("nan")))
            refused = found[0][0] != found[0][0]
            step = float("nan") if refused or not differences._step else differences._step.size
            yield Case(name, label, errors, step, *found)


def draw(found: list[Case], file: Path) -> None:
    """Error against ε, a panel a network; what was chosen, with its stated error."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(case.network for case in found))
    figure, panels = plt.subplots(
        1, len(names), figsize=(4 * len(names), 4), sharey=True, layout="constrained"
    )
    for axes, name in zip(panels, names, strict=True):
        for i, case in enumerate(case for case in found if case.network == name):
            colour = f"C{i}"
            axes.loglog(STEPS, case.errors, color=colour, linewidth=1, label=case.direction)
            true, told = case.plain
            axes.errorbar(case.step, true, [[0], [max(told - true, 0)]], fmt="o", color=colour)
        refused = sum(case.step != case.step for case in found if case.network == name)
        axes.set(title=f"{name}\n{refused} refused", xlabel="step ε", ylim=(1e-6, 10))
    panels[0].set_ylabel("error of one product, relative\n(dots: chosen; bars: stated)")
    panels[0].legend(fontsize=7)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, default=Path("difference-errors.png"))
    chosen = parser.parse_args()
    found = []
    print("| network | direction | step | true | stated | Richardson | stated |")
    print("|---|---|---|---|---|---|---|")
    for case in cases():
        found.append(case)
        cells = [case.step, *case.plain, *case.richardson]
        row = " | ".join("refused" if c != c else f"{c:.1e}" for c in cells)
        print(f"| {case.network} | {case.direction} | {row} |", flush=True)
    pairs = [p for case in found for p in (case.plain, case.richardson) if p[0] == p[0]]
    held = sum(true <= 2 * told for true, told in pairs)
    print(f"\nThe stated error is at least half of the true one in {held} of {len(pairs)} cases.")
    draw(found, chosen.figure)


if __name__ == "__main__":
    main()
