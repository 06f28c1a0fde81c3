"""The mode graph: the ways between all checkpoints of a project, and the tree of low passes.

It is built from results of pair probes; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lsa.maths.paths.spanning import SpanningTree, spanning_tree
from lsa.probe import Metric, Result

NAME = "mode_graph"
# Way between two checkpoints → the step and the metric that is its height above the higher end.
WAYS = {
    "line": ("interpolation", "barrier_max"),
    "aligned": ("interpolation", "barrier_max_aligned"),
    "curve": ("auto_neb", "curve_barrier"),
    "path": ("auto_neb", "barrier"),
}
PASS = ("auto_neb", "path_loss")
MISSING = Metric(float("nan"), "loss")
Stored = Mapping[str, Any]  # a probe's result as JSON


@dataclass(frozen=True)
class Pair:
    """Measurements between two checkpoints, which are given by their numbers."""

    a: int
    b: int
    results: Mapping[str, Stored]  # step → its result

    def metric(self, step: str, name: str) -> Metric:
        """One number, or nan."""
        stored = self.results.get(step, {}).get("metrics", {}).get(name)
        if stored is None:
            return MISSING
        errors = {k: float(v) for k, v in stored["standard_errors"].items()}
        return Metric(float(stored["value"]), stored["unit"], errors)

    def ends(self) -> tuple[Metric, Metric]:
        """The losses of both checkpoints, where the line passes them."""
        curve = self.results["interpolation"]["curves"]["train_loss"]
        errors = curve["y_standard_error"]
        rows = [curve["x"].index(float(end)) for end in (0, 1)]
        a, b = (
            Metric(float(curve["y"][i]), "loss", {"data": float(errors[i])} if errors else {})
            for i in rows
        )
        return a, b


def graph(names: Sequence[str], pairs: Sequence[Pair]) -> Result:
    """The graph of checkpoints with these names.

    Its edges weigh the highest loss on the best path found, as in Draxler et al. 2018. A number of
    several pairs has the mean of their errors for its own: at most that, since all are of the same
    samples.
    """
    n = len(names)
    tables = {way: _table(n, pairs, *source) for way, source in WAYS.items()}
    passes, pass_errors = _table(n, pairs, *PASS)
    minima = _minima(n, pairs)
    tree = spanning_tree(passes)
    metrics = {
        **{f"{way}_barrier": _over(*table, _upper(n)) for way, table in tables.items()},
        "tree_barrier": _over(*tables["path"], tree.edges),
        "tree_barrier_max": _largest(*tables["path"], tree.edges),
        "tree_loss": _over(passes, pass_errors, tree.edges),
        "tree_loss_max": _largest(passes, pass_errors, tree.edges),
        "minima_loss": _over(*minima, list(range(n))),
        **_doubts(tree, passes, pass_errors),
        "n_checkpoints": Metric(n),
        "n_pairs": Metric(len(pairs)),
    }
    arrays = {"nodes": np.array(names), "minima": minima[0], "minima_error": minima[1]}
    for way, (values, errors) in {**tables, "pass": (passes, pass_errors)}.items():
        arrays |= {way: values, f"{way}_error": errors}
    arrays |= {
        "edges": np.array(tree.edges, int).reshape(-1, 2),
        "minimax": tree.minimax,
        "bottleneck": tree.bottleneck,
        "order": np.array(tree.order),
    }
    connected = len(tree.edges) == n - 1
    notes = _notes(metrics, len(pairs), n, connected)
    packed = {f"{NAME}.{name}": values for name, values in arrays.items()}
    return Result(metrics, arrays=packed, converged=connected, notes=tuple(notes))


def _table(n: int, pairs: Sequence[Pair], step: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """One number of every pair and its standard error, symmetric `(n, n)`; nan without one."""
    values, errors = np.full((n, n), np.nan), np.full((n, n), np.nan)
    for pair in pairs:
        metric = pair.metric(step, name)
        for i, j in ((pair.a, pair.b), (pair.b, pair.a)):
            values[i, j], errors[i, j] = metric.value, metric.errors.get("data", np.nan)
    return values, errors


def _minima(n: int, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """The loss of every checkpoint and its standard error."""
    values, errors = np.full(n, np.nan), np.full(n, np.nan)
    for pair in pairs:
        if "interpolation" in pair.results:
            for i, metric in zip((pair.a, pair.b), pair.ends(), strict=True):
                values[i], errors[i] = metric.value, metric.errors.get("data", np.nan)
    return values, errors


def _upper(n: int) -> Sequence[tuple[int, int]]:
    return list(combinations(range(n), 2))


def _over(values: np.ndarray, errors: np.ndarray, pairs: Sequence[Any]) -> Metric:
    """The mean over the pairs that have a finite number."""
    known = [pair for pair in pairs if np.isfinite(values[pair])]
    if not known:
        return MISSING
    mean = float(np.mean([values[pair] for pair in known]))
    return Metric(mean, "loss", _bound(np.array([errors[pair] for pair in known])))


def _largest(values: np.ndarray, errors: np.ndarray, edges: Sequence[tuple[int, int]]) -> Metric:
    """The largest over the edges, with its own error."""
    if not edges:
        return MISSING
    top = max(edges, key=lambda edge: values[edge])
    return Metric(float(values[top]), "loss", _bound(errors[top]))


def _bound(errors: np.ndarray) -> dict[str, float]:
    """Upper bound on the standard error of a mean: the mean of the errors, whatever they share."""
    return {"data": float(np.mean(errors))} if np.isfinite(errors).all() else {}


def _doubts(tree: SpanningTree, passes: np.ndarray, errors: np.ndarray) -> dict[str, Metric]:
    """Numbers of pairs whose own path is above the tree's way, and of pairs within the errors."""
    shortcuts = interchangeable = 0
    for i, j in _upper(len(passes)):
        if (i, j) in tree.edges or not np.isfinite(passes[i, j]):
            continue
        edge = tree.edges[tree.bottleneck[i, j]]
        if passes[i, j] - passes[edge] > 2 * np.nan_to_num(errors[i, j] + errors[edge]):
            shortcuts += 1
        else:
            interchangeable += 1
    return {"n_shortcuts": Metric(shortcuts), "n_interchangeable": Metric(interchangeable)}


def _notes(metrics: Mapping[str, Metric], measured: int, n: int, connected: bool) -> list[str]:
    notes = []
    if measured < n * (n - 1) // 2:
        notes.append(f"{measured} of {n * (n - 1) // 2} pairs are measured; the others failed")
    if not connected:
        notes.append("the measured paths do not connect all checkpoints, so the tree is a forest")
    shortcuts = int(metrics["n_shortcuts"].value)
    if shortcuts:
        notes.append(
            f"{shortcuts} pair(s) have a lower way over other checkpoints than the path found "
            "between them, by more than two standard errors of both: their search ended early"
        )
    interchangeable = int(metrics["n_interchangeable"].value)
    if interchangeable:
        notes.append(
            f"{interchangeable} pair(s) outside the tree are within two standard errors of both "
            "from an edge that they could replace; the heights stand, the tree is one of several"
        )
    return notes


# --- the table ------------------------------------------------------------------------------------

HEADINGS = ("checkpoints", *WAYS, "lowest pass (loss)", "in the tree")


def rows(result: Result) -> list[list[str]]:
    """Every pair in words: barriers of all ways, the lowest pass over the tree, ± two errors."""
    arrays = {name.partition(".")[2]: values for name, values in result.arrays.items()}
    names, edges = arrays["nodes"], [tuple(edge) for edge in arrays["edges"].tolist()]
    table = []
    for i, j in _upper(len(names)):
        cells = [_written(arrays[way][i, j], arrays[f"{way}_error"][i, j]) for way in WAYS]
        which = arrays["bottleneck"][i, j]
        if which >= 0:
            edge = edges[which]
            lowest = _written(arrays["pass"][edge], arrays["pass_error"][edge])
        else:
            lowest = "–"
        inside = "yes" if (i, j) in edges else ""
        table.append([f"{names[i]} – {names[j]}", *cells, lowest, inside])
    return table


def _written(value: Any, error: Any) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:.3g}" + (f" ± {2 * error:.2g}" if np.isfinite(error) else "")
