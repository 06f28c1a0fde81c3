"""`python -m benchmarks.watch_oracles`: every number of `lsa.watch` against its oracle.

The oracles are computed otherwise, in float64: the dense Hessian, a scan of the loss along the
step, one backward pass for each sample. Errors are relative; their mean over the comparisons is
the bias, with its standard error.

    python -m benchmarks.watch_oracles --out docs/watch-oracles.md
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import lsa
from benchmarks.machine import described
from benchmarks.summary import table
from lsa.training import stability

STEPS, EVERY, BATCH, PROBE = 30, 3, 32, 64
DRAWS, SAMPLES = 1000, 1024  # steps at a rate of 0, and of how many samples

OF_TOP = "directional_sharpness, of λ_max"
Errors = dict[str, list[float]]  # name → relative errors


class Exact:
    """L of a network on some samples in float64, with all of its derivatives."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self._model, self._x, self._y = copy.deepcopy(model).double().eval(), x.double(), y
        self._shapes = {name: p.shape for name, p in model.named_parameters()}

    def each(self, theta: Tensor) -> Tensor:
        """Losses `(N,)`."""
        parts = theta.split([shape.numel() for shape in self._shapes.values()])
        named = {n: t.view(s) for (n, s), t in zip(self._shapes.items(), parts, strict=True)}
        outputs = torch.func.functional_call(self._model, named, (self._x,))
        return F.cross_entropy(outputs, self._y, reduction="none")

    def loss(self, theta: Tensor) -> Tensor:
        """Their mean."""
        return self.each(theta).mean()

    def hessian(self, theta: Tensor) -> Tensor:
        """`(d, d)`."""
        return torch.func.hessian(self.loss)(theta)  # pyright: ignore[reportReturnType]

    def noise(self, theta: Tensor) -> tuple[float, float]:
        """tr C and |G|², one backward pass for each sample."""
        t = theta.clone().requires_grad_()
        rows = [torch.autograd.grad(loss, t, retain_graph=True)[0] for loss in self.each(t)]
        g = torch.stack(rows)
        return float((g - g.mean(0)).square().sum(1).mean()), float(g.mean(0).square().sum())


def digits() -> tuple[Tensor, Tensor]:
    """Images `(n, 1, 8, 8)` and classes."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x)[order].float().view(-1, 1, 8, 8) / 16, torch.tensor(y)[order]


def networks() -> dict[str, nn.Module]:
    """Small enough for a dense Hessian."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "mlp": nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)),
            "cnn": nn.Sequential(
                nn.Conv2d(1, 4, 3, stride=2), nn.GELU(), nn.Conv2d(4, 8, 3), nn.GELU(),
                nn.Flatten(), nn.Linear(8, 10),
            ),
            "cnn with kinks": nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10),
            ),
        }  # fmt: skip


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


# --- at one θ -------------------------------------------------------------------------------------


def of_training(model: nn.Module, name: str, found: Errors, inside: dict[str, list[bool]]) -> None:
    """Curvature, gains and norms of a training with clipping, every third step."""
    x, y = digits()
    probe, exact = (x[:PROBE], y[:PROBE]), Exact(model, x[:PROBE], y[:PROBE])
    optimizer = OPTIMIZERS[name](model.parameters())
    kinds = ["update", "sharpness", "lambda_max"]
    options = {"every": EVERY, "budget": None, "track": False, "strict": True, "measure": kinds}
    with lsa.watch(model, optimizer, batches=probe, **options) as watch:
        for step in range(STEPS):
            part = slice(PROBE + step * BATCH, PROBE + (step + 1) * BATCH)
            own, start = Exact(model, x[part], y[part]), flat(model)
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            row, end = watch.rows[-1], flat(model)
            before = torch.func.grad(own.loss)(start).norm().item()
            add(found, "gradient_norm", row["gradient_norm"], min(1.0, before))
            if "gradient_norm_unclipped" in row:
                add(found, "gradient_norm_unclipped", row["gradient_norm_unclipped"], before)
            add(found, "update_norm", row["update_norm"], (end - start).norm().item())
            if "lambda_max" in row:
                compare(row, exact, start, end, found)
                of_top(row, exact, start, end, found)
                spectra(row, exact, end, stability.read(optimizer, [*model.parameters()]), found)
                for key in ("lambda_max", "sharpness"):
                    error = abs(found[key][-1]) * row[key]
                    inside.setdefault(key, []).append(error <= 1.01 * row[f"{key}_residual"])


def compare(row: dict[str, float], exact: Exact, start: Tensor, end: Tensor, to: Errors) -> None:
    """What is measured along a step."""
    u = end - start
    slope = float(torch.func.grad(exact.loss)(start) @ u)
    curvature = float(u @ exact.hessian(start) @ u)
    change = float(exact.loss(end) - exact.loss(start))
    add(to, "directional_sharpness", row["directional_sharpness"], curvature / float(u @ u))
    add(to, "gain_first_order", row["gain_first_order"], -slope)
    add(to, "gain_second_order", row["gain_second_order"], -slope - curvature / 2)
    add(to, "gain", row["gain"], -change)
    factor = crossing(lambda s: float(exact.loss(start + s * u))) if slope < 0 else math.nan
    if math.isfinite(factor) and "critical_factor" in row:
        add(to, "critical_factor", row["critical_factor"], factor)


def of_top(row: dict[str, float], exact: Exact, start: Tensor, end: Tensor, to: Errors) -> None:
    """The error of the curvature along a step as a share of the largest curvature there is."""
    H, u = exact.hessian(start), end - start
    apart = row["directional_sharpness"] - float(u @ H @ u) / float(u @ u)
    to.setdefault(OF_TOP, []).append(apart / float(torch.linalg.eigvalsh(H)[-1]))


def spectra(
    row: dict[str, float],
    exact: Exact,
    theta: Tensor,
    state: stability.OptimizerState,
    to: Errors,
) -> None:
    """What is measured of the Hessian after a step."""
    H = exact.hessian(theta)
    P = state.preconditioner(theta)
    assert P is not None
    root = P.diagonal.rsqrt()
    add(to, "lambda_max", row["lambda_max"], float(torch.linalg.eigvalsh(H)[-1]))
    felt = float(torch.linalg.eigvalsh(root[:, None] * H * root)[-1])
    add(to, "sharpness", row["sharpness"], felt)


def add(errors: Errors, name: str, value: float, truth: float) -> None:
    """The relative error of a value."""
    errors.setdefault(name, []).append(value / truth - 1)


def flat(model: nn.Module) -> Tensor:
    """θ in float64."""
    return parameters_to_vector(model.parameters()).detach().double()


def crossing(loss: Callable[[float], float]) -> float:
    """The first length at which a loss is above its start again: by scan, then bisection."""
    at0 = loss(0.0)
    grid = torch.logspace(-2, math.log10(64), 300, dtype=torch.float64).tolist()
    above = next((i for i, s in enumerate(grid) if loss(s) > at0), None)
    if above is None:
        return math.nan
    low, high = grid[above - 1] if above else 0.0, grid[above]
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if loss(middle) > at0 else (middle, high)
    return high


# --- over draws -----------------------------------------------------------------------------------


def of_noise(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Rows of three ways to the noise, of many draws at one θ: a rate of 0."""
    x, y = digits()
    x, y = x[:SAMPLES], y[:SAMPLES]
    trace, signal = Exact(model, x, y).noise(flat(model))
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "accumulation, 4 passes": (4, {}),
        "noise_of_samples": (1, {"measure": ["noise_of_samples"]}),
    }
    options = {"every": 1, "budget": None, "track": False, "strict": True}
    for way, (passes, chosen) in ways.items():
        optimizer, rng = torch.optim.SGD(model.parameters(), lr=0.0), torch.Generator()
        rng.manual_seed(1)
        with lsa.watch(model, optimizer, **chosen, **options) as watch:
            for _ in range(DRAWS):
                optimizer.zero_grad()
                for _ in range(passes):
                    some = torch.randint(SAMPLES, (BATCH // passes,), generator=rng)
                    (F.cross_entropy(model(x[some]), y[some]) / passes).backward()
                optimizer.step()
        rows = watch.rows
        told = [r for r in rows[49::50] if "noise_scale" in r]
        covered = [r["noise_scale_low"] <= trace / signal <= r["noise_scale_high"] for r in told]
        yield from noise_rows(way, rows, (trace, signal), f"{sum(covered)} of {len(covered)}")
    rows = []
    for draw in range(DRAWS // 10):
        rng = torch.Generator().manual_seed(draw)
        some = torch.randint(SAMPLES, (PROBE,), generator=rng)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        given = {"batches": (x[some], y[some]), "measure": ["noise"]}
        with lsa.watch(model, optimizer, **given, **options) as watch:
            optimizer.zero_grad()
            F.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
        rows += watch.rows
    reach = [abs(r["gradient_squared"] - signal) / r["gradient_squared_se_data"] for r in rows]
    inside = f"{sum(r <= 1.96 for r in reach)} of {len(reach)}"
    yield from noise_rows("probe set of 64", rows, (trace, signal), inside)


def noise_rows(
    way: str, rows: list[dict[str, float]], truth: tuple[float, float], covered: str
) -> Iterator[dict[str, Any]]:
    """The mean of unbiased estimates against the truth."""
    for name, exact in zip(("noise_trace", "gradient_squared"), truth, strict=True):
        values = [row[name] / exact - 1 for row in rows]
        yield {
            "from": way,
            "number": f"`{name}`",
            "draws": len(values),
            "bias": percent(statistics.mean(values)),
            "standard error of it": percent(statistics.stdev(values) / math.sqrt(len(values))),
            "one draw scatters by": percent(statistics.stdev(values)),
            "95 % intervals that hold the truth": covered,
        }


# --- the page -------------------------------------------------------------------------------------


ORACLES = {
    "gradient_norm": "the batch's gradient in float64, clipped",
    "gradient_norm_unclipped": "the same before clipping",
    "update_norm": "difference of the weights in float64",
    "directional_sharpness": "uᵀHu/‖u‖² with the dense Hessian",
    OF_TOP: "the same; errors as shares of λ_max",
    "gain_first_order": "−gᵀu",
    "gain_second_order": "−gᵀu − uᵀHu/2",
    "gain": "L before − L after in float64",
    "critical_factor": "scan of 300 lengths, then bisection",
    "lambda_max": "all eigenvalues of the dense H",
    "sharpness": "all eigenvalues of P^(−½)HP^(−½)",
}


def percent(value: float) -> str:
    """A share as percent, with two digits."""
    return f"{100 * value:.2g} %"


def rows(found: Errors, inside: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """One row a number."""
    made = []
    for name, oracle in ORACLES.items():
        errors = found[name]
        sizes = sorted(map(abs, errors))
        known = inside.get(name)
        made.append(
            {
                "number": f"`{name}`",
                "oracle": oracle,
                "comparisons": len(errors),
                "median error": percent(statistics.median(sizes)),
                "nine of ten below": percent(sizes[int(0.9 * (len(sizes) - 1))]),
                "largest": percent(sizes[-1]),
                "bias": percent(statistics.mean(errors)),
                "within its residual": f"{sum(known)} of {len(known)}" if known else "",
            }
        )
    return made


def main() -> None:
    """Print the tables, or write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.watch_oracles", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, help="Markdown file")
    chosen = parser.parse_args()
    found: Errors = {}
    inside: dict[str, list[bool]] = {}
    for name in OPTIMIZERS:
        for model in networks().values():
            of_training(model, name, found, inside)
    noise = [*of_noise(networks()["mlp"])]
    text = "\n\n".join(
        [
            "# Numbers of a watched training against oracles",
            f"`python -m benchmarks.watch_oracles` on {described('cpu')}",
            "Three networks on handwritten digits: an MLP, a CNN with GELU, and one with ReLU and "
            f"max pooling ({', '.join(count())} parameters). SGD with momentum and AdamW make "
            f"{STEPS} steps of {BATCH} samples each, with clipping. Every third step is measured "
            f"in float32 on {PROBE} other samples. All oracles are in float64.",
            table(rows(found, inside)),
            "Errors are relative: curvatures and gains near zero have large ones. The eigenvalues "
            "are of ten measurements in a row, with seven products each at most after the first; "
            "where these do not suffice, the residual that is stated with them says so. It did not "
            "where another eigenvalue overtook the largest in the CNN with kinks; the next "
            "measurement found that.",
            f"## Noise\n\nThe MLP at one θ, {SAMPLES} samples. Batches of {BATCH} and probe sets "
            f"of {PROBE} are drawn with replacement; the truth is a backward pass for each sample."
            " Intervals are of the noise scale; of `gradient_squared` on probe sets.",
            table(noise),
        ]
    )
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n", encoding="utf-8")


def count() -> list[str]:
    """Parameters of the networks."""
    return [str(sum(p.numel() for p in m.parameters())) for m in networks().values()]


if __name__ == "__main__":
    main()
