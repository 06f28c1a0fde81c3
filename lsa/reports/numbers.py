"""Numbers as text, with their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lsa.reports.statistics.comparison import interval, middle


def written(runs: Sequence[Mapping[str, float]], name: str) -> str:
    """A number of one checkpoint or pair, over its seeds, with what is known of its error.

    ± is half the width of a 95 % interval: over several seeds Student's t of their mean, of one
    seed two standard errors, of each source that it has. Where not all seeds are finite, the median
    of those known stands alone. The residual of an eigenvalue bounds the error of
    its search, and stands where it is a hundredth of ± or more.
    """
    values = [run[name] for run in runs if name in run]
    open_ends = [run[f"{name}_low"] for run in runs if name not in run and f"{name}_low" in run]
    if open_ends:  # a mean over the others would be of those alone that are small
        lows = [*open_ends, *(run[f"{name}_low"] for run in runs if name in run)]
        of = f" ({len(open_ends)} of {len(lows)} without an upper end)" if len(lows) > 1 else ""
        return f"> {min(lows):.4g}{of}"
    if not values:
        return "–"
    if len(values) > 1:
        finite = int(np.isfinite(values).sum())
        if finite < len(values):
            return f"median {middle(np.array(values)):.4g} ({finite} of {len(values)} finite)"
        mean, _, high = interval(np.array(values))
        return f"{mean:.4g} ± {_rounded(high - mean)}{_residual(runs, name, high - mean)}"
    low, high = (runs[0].get(f"{name}_{end}") for end in ("low", "high"))
    if low is not None:
        end = "∞" if high is None or np.isinf(high) else f"{high:.4g}"
        return f"{values[0]:.4g} ({low:.4g} … {end})"
    start = f"{name}_se_"
    errors = {k.removeprefix(start): e for k, e in runs[0].items() if k.startswith(start)}
    named = len(errors) > 1
    beside = [f" ± {_rounded(2 * e)}{named * f' ({k})'}" for k, e in errors.items()]
    rest = _residual(runs, name, 2 * max(errors.values(), default=0.0))
    return f"{values[0]:.4g}{','.join(beside)}{rest}"


def _residual(runs: Sequence[Mapping[str, float]], name: str, error: float) -> str:
    """The largest residual of an eigenvalue, where it is a hundredth of the error or more."""
    known = [run[f"{name}_residual"] for run in runs if f"{name}_residual" in run]
    largest = max(known, default=0.0)
    return f"; residual {largest:.2g}" if largest > 0 and largest >= error / 100 else ""


def _rounded(error: float) -> str:
    """Two digits, without an exponent where a reader would not write one."""
    return f"{float(f'{error:.2g}'):g}"
