"""Metrics under the names that MLflow has them by. Nothing here waits for torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping

from lsa.probe import Metric

NOTE = "lsa.note."  # + its number: a tag
LONGEST = 250  # characters of a name in MLflow


def taken(name: str) -> str:
    """A metric's name as MLflow takes it: itself, or without what it refuses and with a hash of it.

    The names of a network's own modules stand in names of metrics; those of a ModuleDict may be any
    text. One name that MLflow refuses would keep all numbers back that are sent with it.
    """
    plain = re.sub(r"[^/\w.\- :]", "_", name)
    plain = "/".join(part if part.strip(".") else "_" for part in plain.split("/"))
    if plain == name and len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8]
    return f"{plain[: LONGEST - 9]}-{digest}"


def flat(prefix: str, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Metrics as MLflow stores them: `prefix/name`, and `prefix/name_se_source` per error."""
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        values[f"{prefix}/{name}"] = metric.value
        for source, error in metric.errors.items():
            values[f"{prefix}/{name}_se_{source}"] = error
    return values


def numbers(values: Mapping[str, float], curves: Collection[str] = ()) -> dict[str, Metric]:
    """The inverse of `flat`, names with their prefix; without the points of curves."""
    metrics = {}
    for name, value in sorted(values.items()):
        if "_se_" in name or name in curves:
            continue
        start = f"{name}_se_"
        errors = {k.removeprefix(start): e for k, e in values.items() if k.startswith(start)}
        metrics[name] = Metric(value, errors=errors)
    return metrics
