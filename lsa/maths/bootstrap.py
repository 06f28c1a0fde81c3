"""The bootstrap (Efron 1979): errors of numbers that are no means, from resampled means."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

RESAMPLES = 200  # a standard error is then known to 5 %


def means(
    samples: Mapping[str, Tensor], rng: torch.Generator, resamples: int = RESAMPLES
) -> dict[str, Tensor]:
    """Means over the samples, and over each resampled data set.

    One draw serves all points and all tables of one size, so that what they have in common cancels
    in differences.

    Args:
        samples: Name → values `(points, n)`.
        rng: On the CPU.
        resamples: Number of data sets drawn with replacement.

    Returns:
        Name → `(1 + resamples, points)` in float64, the plain means first; `(1, points)` where
        n = 1, since a single sample tells nothing of an error.
    """
    tables = {name: table.double() for name, table in samples.items()}
    rows = {name: [table.mean(1)] for name, table in tables.items()}
    sizes = dict.fromkeys(table.shape[1] for table in tables.values())
    for _ in range(resamples):
        drawn = {n: torch.randint(n, (n,), generator=rng).bincount(minlength=n) for n in sizes}
        for name, table in tables.items():
            n = table.shape[1]
            if n > 1:
                rows[name].append(table @ drawn[n].double() / n)
    return {name: torch.stack(r) for name, r in rows.items()}


def estimate(values: Tensor) -> tuple[float, float | None]:
    """The first of values `(1 + resamples,)`, and its error; None without resamples.

    The error is the deviation of the others plus the distance of their mean. A largest value is
    biased upwards, and on a kink (a barrier whose top is an end) the deviation alone covers too
    little: 85 % within two of them.
    """
    if len(values) <= 2:
        return values[0].item(), None
    error = values[1:].std() + (values[1:].mean() - values[0]).abs()
    return values[0].item(), error.item()
