"""Spanning trees against scipy, against every way, and on a potential whose passes are known."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
import torch
from potentials import FourWells
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import squareform

from lsa.maths.paths.autoneb import Cycle, auto_neb
from lsa.maths.paths.spanning import SpanningTree, spanning_tree
from lsa.runtime.errors import InputError


def random_graph(n: int, seed: int) -> np.ndarray:
    return squareform(np.random.default_rng(seed).uniform(0.1, 1, n * (n - 1) // 2))


def total(tree: SpanningTree, weights: np.ndarray) -> float:
    return sum(weights[edge] for edge in tree.edges)


@pytest.mark.parametrize("seed", range(5))
def test_the_tree_is_scipys(seed):
    weights = random_graph(12, seed)
    tree = spanning_tree(weights)
    theirs = {tuple(sorted(pair)) for pair in np.argwhere(minimum_spanning_tree(weights).toarray())}
    assert set(tree.edges) == theirs
    assert [weights[edge] for edge in tree.edges] == sorted(weights[edge] for edge in theirs)


@pytest.mark.parametrize("seed", range(3))
def test_minimax_heights_are_those_of_single_linkage_and_of_every_way(seed):
    weights = random_graph(6, seed)
    tree = spanning_tree(weights)
    off = ~np.eye(6, dtype=bool)
    expected = squareform(cophenet(linkage(squareform(weights), "single")))
    np.testing.assert_array_equal(tree.minimax[off], expected[off])
    for a, b in combinations(range(6), 2):
        others = [node for node in range(6) if node not in (a, b)]
        ways = [(a, *via, b) for r in range(5) for via in permutations(others, r)]
        lowest = min(max(weights[i, j] for i, j in pairwise(way)) for way in ways)
        assert tree.minimax[a, b] == lowest
        assert weights[tree.edges[tree.bottleneck[a, b]]] == lowest


def test_minimax_heights_are_ultrametric():
    h = spanning_tree(random_graph(15, 0)).minimax
    for a, b, c in permutations(range(15), 3):
        assert h[a, c] <= max(h[a, b], h[b, c])


def test_what_an_edge_joins_lies_side_by_side():
    weights = random_graph(20, 1)
    tree = spanning_tree(weights)
    assert sorted(tree.order) == list(range(20))
    for height in (weights[edge] for edge in tree.edges):
        joined = tree.minimax[np.ix_(tree.order, tree.order)] <= height
        for row, own in zip(joined, range(20), strict=True):
            members = np.flatnonzero(row | (np.arange(20) == own))
            assert members[-1] - members[0] == len(members) - 1


def test_an_edge_of_weight_zero_is_an_edge_and_nan_is_none():
    nan = np.nan
    weights = np.array([[0, 0, nan, nan], [0, 0, 2, nan], [nan, 2, 0, nan], [nan] * 3 + [0]])
    tree = spanning_tree(weights)
    assert tree.edges == ((0, 1), (1, 2))
    assert tree.minimax[0, 2] == 2 and np.isinf(tree.minimax[3, 0])
    assert tree.bottleneck[3, 0] == -1 and sorted(tree.order) == [0, 1, 2, 3]


@pytest.mark.parametrize("weights", [np.zeros((2, 3)), np.array([[0, 1], [2, 0]]), np.zeros(3)])
def test_what_is_no_graph_is_refused(weights):
    with pytest.raises(InputError, match="must be a square, symmetric matrix"):
        spanning_tree(weights)


def test_planted_passes_are_found_by_autoneb_and_the_tree_takes_the_low_ones():
    wells = FourWells(low=1.0, high=3.0)
    ends = wells.ends()
    heights = np.zeros((4, 4))
    for i, j in combinations(range(4), 2):
        found = auto_neb(
            wells, wells.dense, ends[i], ends[j],
            schedule=[Cycle(200, 0.005)] * 4, initial_pivots=7, between=9,
        )  # fmt: skip
        heights[i, j] = heights[j, i] = found.energies.max()
    tree = spanning_tree(heights)
    # Corners 0 1 / 2 3: along x the passes are low, along y high; a diagonal goes over both.
    assert set(tree.edges[:2]) == {(0, 1), (2, 3)}
    assert [heights[edge] for edge in tree.edges] == pytest.approx([1, 1, 3], abs=0.02)
    expected = np.where(wells.same_row(), 1.0, 3.0)
    off = ~np.eye(4, dtype=bool)
    assert tree.minimax[off] == pytest.approx(expected[off], abs=0.02)
    line = wells.dense((ends[0] + ends[3])[None] / 2)
    assert torch.isclose(line, torch.tensor([4.0], dtype=line.dtype))  # straight: over the hilltop
