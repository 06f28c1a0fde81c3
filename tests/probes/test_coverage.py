"""How often two standard errors, or an interval, hold the population's number, over data sets.

A population of 20,000 samples, of which each data set has 200; the network and θ stay. Errors over
random vectors are added to those over the data. `python -m tests.simulations` prints the shares.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten
from lsa.probe import Metric, find

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("global_rng_untouched")]

POPULATION, SAMPLES, SETS = 20_000, 200, 100
OPTIONS: dict[str, dict[str, Any]] = {
    "lanczos": {"k": 1, "k_min": 1, "density_probes": 0, "bias": "no"},
    "gradient": {},
    "sgd_noise": {"k": 1, "probes": 0},
    "sharpness": {"probes": 10, "starts": 1, "rho": 0.2, "adaptive_rho": 0.2},
    "layers": {"k": 1, "probes": 2, "lower": "no"},
}
LEAST = 0.9 - 3 * math.sqrt(0.9 * 0.1 / SETS)  # three deviations below 90 %


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def population() -> tuple[Landscape, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(POPULATION, 6, generator=generator(7), dtype=torch.float64)
    x *= torch.tensor([2.0, 1.5, 1, 1, 0.5, 0.5], dtype=torch.float64)
    y = torch.randint(0, 3, (POPULATION,), generator=generator(8))
    return Landscape(model, x, y), flatten(model)


def measured(name: str, landscape: Landscape, seed: int, **more: Any) -> dict[str, Metric]:
    _, theta = population()
    options = OPTIONS[name] | more
    return dict(find(name)(landscape=landscape, theta=theta, rng_seed=seed, **options).metrics)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_standard_errors_cover_the_populations_number(name, record_property):
    everything, _ = population()
    finer = {"probes": 200} if OPTIONS[name].get("probes") else {}
    truth = measured(name, everything, 0, **finer)
    inside: dict[str, list[bool]] = {}
    sources: dict[str, set[str]] = {}
    absent: dict[str, int] = {}
    for seed in range(SETS):
        drawn = torch.randperm(POPULATION, generator=generator(seed))[:SAMPLES]
        found = measured(name, everything.subset(drawn), seed)
        for number, value in truth.items():
            if f"{number}_high" in truth:  # its interval, which may have no upper end
                low = found.get(f"{number}_low", Metric(math.inf)).value
                high = found.get(f"{number}_high", Metric(math.inf)).value
                inside.setdefault(number, []).append(low <= value.value <= high)
                sources.setdefault(number, set()).add("data")
            elif number.endswith(("_low", "_high")):
                continue
            elif number not in found:  # a ratio that is left out claims nothing
                inside.setdefault(number, []).append(True)
                absent[number] = absent.get(number, 0) + 1
            elif "data" in (errors := found[number].errors):  # others are of these samples alone
                off = abs(found[number].value - value.value)
                inside.setdefault(number, []).append(off <= 2 * math.hypot(*errors.values()))
                sources.setdefault(number, set()).update(errors)
    assert len(sources) >= 1
    for number, of in sources.items():
        share = sum(inside[number]) / SETS
        error = " and ".join(sorted(of))
        label = f"{name}: {number}{f', left out in {absent[number]}' if number in absent else ''}"
        record_property("coverage", [label, error, "95 %", share, SETS])
        assert share >= LEAST, number
