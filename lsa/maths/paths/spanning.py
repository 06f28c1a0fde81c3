"""The minimum spanning tree of a weighted graph, and the minimax ways that it holds.

Between any two nodes the way through the tree has the smallest largest edge of all ways through the
graph (Hu 1961). So of the passes measured between minima the tree keeps those that matter, and its
minimax heights are ultrametric: h_AC ≤ max(h_AB, h_BC) (Draxler et al. 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lsa.runtime.errors import InputError


@dataclass(frozen=True)
class SpanningTree:
    """The tree, or a forest where the graph does not hold together."""

    edges: tuple[tuple[int, int], ...]  # (i, j), i < j, by rising weight; n − 1 of a tree
    minimax: np.ndarray  # (n, n) smallest largest weight of a way; inf without one, nan to itself
    bottleneck: np.ndarray  # (n, n) which of `edges` has that weight; −1 without one
    order: tuple[int, ...]  # of the nodes, such that what any edge joins lies side by side


def spanning_tree(weights: np.ndarray) -> SpanningTree:
    """The minimum spanning tree by Kruskal's algorithm.

    Args:
        weights: `(n, n)`, symmetric; what is not finite is no edge. The diagonal is not read.

    Raises:
        InputError: Not a square, symmetric matrix.
    """
    if weights.ndim != 2 or not np.array_equal(weights, weights.T, equal_nan=True):
        raise InputError(f"weights of shape {weights.shape} must be a square, symmetric matrix")
    n = len(weights)
    minimax = np.full((n, n), np.inf)
    np.fill_diagonal(minimax, np.nan)
    bottleneck = np.full((n, n), -1)
    joined = [[i] for i in range(n)]  # the nodes that each one hangs together with, shared
    edges: list[tuple[int, int]] = []
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if np.isfinite(weights[i, j])]
    for i, j in sorted(pairs, key=lambda pair: weights[pair]):
        a, b = joined[i], joined[j]
        if a is b:
            continue
        for table, value in ((minimax, weights[i, j]), (bottleneck, len(edges))):
            table[np.ix_(a, b)] = value
            table[np.ix_(b, a)] = value
        edges.append((i, j))
        a += b
        for node in b:
            joined[node] = a
    parts = {id(part): part for part in joined}
    order = tuple(node for part in parts.values() for node in part)
    return SpanningTree(tuple(edges), minimax, bottleneck, order)
