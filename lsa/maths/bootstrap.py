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

    All points, and all tables of the same number of samples, share a draw. So what two of them have
    in common cancels in their difference.

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
    """A number and its standard error by the bootstrap.

    The error is the standard deviation over the resamples plus the distance of their mean from the
    number. A maximum is biased upwards, and at a kink (a barrier whose top is an endpoint) the
    standard deviation alone is too small: twice of it covered the truth in 85 % of cases.

    Args:
        values: `(1 + resamples,)`, the number of all samples first.

    Returns:
        The number, and its error; None where there are no two resamples.
    """
    if len(values) <= 2:
        return values[0].item(), None
    error = values[1:].std() + (values[1:].mean() - values[0]).abs()
    return values[0].item(), error.item()
