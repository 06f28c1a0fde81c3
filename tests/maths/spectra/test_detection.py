"""Eigenvalues that a chain from a random start excludes with 95 %: closed forms, simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from spectra import Counting, generator, normal

from lsa.maths.spectra.detection import excluded, least_share
from lsa.maths.spectra.eigenpairs import lanczos, start_vector


def chain_of(eigenvalues: np.ndarray, start: np.ndarray, steps: int) -> list[tuple[float, float]]:
    """αⱼ, βⱼ₊₁ of the recurrence, with full reorthogonalisation."""
    V, found = [start / np.linalg.norm(start)], []
    for _ in range(steps):
        w = eigenvalues * V[-1]
        alpha = w @ V[-1]
        for _ in range(2):
            w = w - np.array(V).T @ (np.array(V) @ w)
        found.append((alpha, float(np.linalg.norm(w))))
        V.append(w / found[-1][1])
    return found


def test_one_product_in_two_dimensions_in_closed_form():
    """1 + p₁² = 1/c² with p₁ = (λ − α)/β."""
    share = least_share(2)
    assert share == pytest.approx(math.cos(0.475 * math.pi) ** 2)  # of an angle, 5 % beside π/2
    limit = excluded([(0.5, 2.0)], dimension=2)
    assert limit == pytest.approx(0.5 + 2 * math.sqrt(1 / share - 1), rel=1e-5)


@pytest.mark.parametrize("hidden", [1.05, 2.0, 10.0])
def test_it_holds_as_often_as_it_says(hidden, record_property):
    """Starts that miss an eigenvalue: those in which the limit lies below it are 5 % at most."""
    d, trials, rng = 400, 1000, np.random.default_rng(0)
    eigenvalues = np.concatenate([[hidden], np.linspace(-0.5, 1, d - 1)])
    for steps in (2, 5, 9):
        wrong = sum(
            excluded(chain_of(eigenvalues, rng.standard_normal(d), steps), dimension=d) < hidden
            for _ in range(trials)
        )
        label = f"lanczos: lambda_max_limit, {hidden:g} hidden, {steps} products"
        row = [label, "start", "at least 95 %", 1 - wrong / trials, trials]
        record_property("coverage", row)
        assert wrong <= 0.05 * trials + 3 * math.sqrt(0.05 * 0.95 * trials), steps


def test_it_is_no_wider_than_it_must_be():
    """With a start that has the least share itself, the limit is near the eigenvalue."""
    d, hidden = 400, 2.0
    eigenvalues = np.concatenate([[hidden], np.linspace(-0.5, 1, d - 1)])
    start = np.full(d, math.sqrt((1 - least_share(d)) / (d - 1)))
    start[0] = math.sqrt(least_share(d))
    limit = excluded(chain_of(eigenvalues, start, 4), dimension=d)
    assert hidden <= limit < 1.3 * hidden


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_after_a_search_it_lies_just_above_the_largest(near, seed):
    d = 20_000
    spectrum = torch.cat([torch.tensor([33.0, 12.0, 7.0]), torch.linspace(-1, 1, d - 3)])
    direction = normal(d, seed=50 + seed) if near else None
    start = start_vector(torch.zeros(d), generator(seed), direction)
    options = {"rng": generator(seed), "largest": 1, "smallest": 1}
    found = lanczos(Counting(spectrum), start, random=0.25 if near else 1.0, **options)
    assert found.converged and 33 * (1 - 1e-5) <= found.limit < 33 * 1.001
    unknown = lanczos(Counting(spectrum), start, **options)
    assert unknown.limit == math.inf
