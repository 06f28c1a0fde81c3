from __future__ import annotations

import math

import pytest
import torch
from potentials import F64, CurvedWell, MullerBrown, SmallClassifier
from torch import Tensor

from lsa.maths.paths.autoneb import DRAXLER_2018, Cycle, MinimumEnergyPath, auto_neb, insert_pivots
from lsa.maths.paths.polyline import head_collapse_path, refine, segment_lengths
from lsa.runtime.errors import InputError


def search_well(cycles: list[Cycle], **options) -> tuple[CurvedWell, MinimumEnergyPath]:
    well = CurvedWell()
    a, b = well.ends()
    options = {"momentum": 0.5, "tol": 1e-6} | options
    return well, auto_neb(well, well.dense, a, b, schedule=cycles, **options)


# --- known saddles --------------------------------------------------------------------------------


def test_muller_brown_from_three_pivots() -> None:
    potential = MullerBrown()
    a, b = potential.ends()
    cycles = [Cycle(500, 2e-4)] * 4
    found = auto_neb(potential, potential.dense, a, b, schedule=cycles, momentum=0.5)
    assert found.converged
    assert found.max_energy == pytest.approx(potential.saddle, abs=2e-9)
    assert found.cycles[0].max_energy > potential.saddle + 10  # three pivots are too few
    assert [c.pivots for c in found.cycles] == [5, 7, 7, 7]
    assert found.energies[0].item() == pytest.approx(potential.minima[0], abs=1e-8)
    assert found.energies[-1].item() == pytest.approx(potential.minima[1], abs=1e-8)


@pytest.mark.parametrize("initial", [2, 3])  # an even and an odd number of pivots
@pytest.mark.parametrize("method", ["neb", "string"])
def test_minimax_of_the_curved_well_is_one(initial: int, method: str) -> None:
    cycles = [Cycle(100, 0.02), Cycle(100, 0.02), Cycle(200, 0.002)]
    _, found = search_well(cycles, initial_pivots=initial, method=method, momentum=0.9)
    assert found.max_energy == pytest.approx(1, abs=1e-3)


def test_minibatch_noise_leaves_the_saddle_where_it_is() -> None:
    well = CurvedWell()
    a, b = well.ends()

    def noisy(p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A random linear term, the same for every pivot of the step."""
        slope = 0.3 * torch.randn(50, generator=torch.Generator().manual_seed(step), dtype=F64)
        energies, gradients = well(p, step)
        return energies + p @ slope, gradients + slope

    cycles = [Cycle(200, 0.02), Cycle(200, 0.02), Cycle(800, 0.002)]
    found = auto_neb(noisy, well.dense, a, b, schedule=cycles, momentum=0.5, climbing=False)
    # Noise s gives a coordinate of curvature h the stationary variance lr s²/2h(1−μ), an energy of
    # m = lr s²/4(1−μ) for any h: over 49 coordinates across the path 49m, standard deviation √98 m.
    m = 0.002 * 0.3**2 / (4 * 0.5)
    assert 0.999 < found.max_energy < 1 + (49 + 5 * math.sqrt(98)) * m
    assert not found.converged and "budget" in found.stop_reason


def test_draxler_schedule() -> None:
    assert len(DRAXLER_2018) == 14
    assert sum(cycle.steps for cycle in DRAXLER_2018) == 16_000


# --- networks -------------------------------------------------------------------------------------


def test_path_between_independent_networks_is_below_ln_c_and_the_straight_line() -> None:
    net = SmallClassifier()
    a, b = net.trained(1), net.trained(2)
    straight = net.dense(refine(torch.stack([a, b]), 40)).max().item()
    found = auto_neb(net, net.dense, a, b, schedule=[Cycle(100, 0.3)] * 3, climbing=False)
    ends = net.dense(torch.stack([a, b])).max().item()
    assert ends <= found.max_energy < min(straight, math.log(net.classes))
    assert found.max_energy - ends < 0.1 * (straight - ends)


def test_path_to_a_permuted_copy_is_below_the_straight_line() -> None:
    net = SmallClassifier()
    a = net.trained(1)
    b = net.permuted(a, seed=0)
    loss_a, loss_b = net.dense(torch.stack([a, b]))
    assert loss_a.item() == pytest.approx(loss_b.item(), abs=1e-14)
    straight = net.dense(refine(torch.stack([a, b]), 40)).max().item()
    found = auto_neb(net, net.dense, a, b, schedule=[Cycle(100, 0.3)] * 3, climbing=False)
    assert straight > loss_a + 0.1
    assert found.max_energy - loss_a < 0.1 * (straight - loss_a)


def test_the_ln_c_baseline_bounds_a_search_without_budget() -> None:
    net = SmallClassifier()
    a, b = 4 * net.trained(1), 4 * net.trained(2)
    collapse = head_collapse_path(a, b, net.head)
    cycles = [Cycle(1, 1e-4)]
    without = auto_neb(net, net.dense, a, b, schedule=cycles)
    found = auto_neb(net, net.dense, a, b, schedule=cycles, baselines=[collapse])
    assert without.max_energy > math.log(net.classes)  # otherwise this shows nothing
    assert found.origin == "baseline 1"
    assert torch.equal(found.pivots, collapse)
    assert found.max_energy == pytest.approx(math.log(net.classes), abs=1e-12)
    assert math.isnan(found.perp_grad_norm) and not found.converged


# --- never worse than what was there --------------------------------------------------------------


def test_a_rate_that_spoils_the_path_returns_the_straight_line() -> None:
    well = CurvedWell(a=0.05)
    a, b = well.ends()

    def misleading(p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        energies, gradients = well(p, step)
        return energies, -gradients

    found = auto_neb(misleading, well.dense, a, b, schedule=[Cycle(50, 0.05)] * 2)
    assert found.cycles[-1].max_energy > 1.05 + 0.1
    assert found.origin == "straight line"
    assert found.max_energy == pytest.approx(1.05, abs=1e-12)


def test_a_better_earlier_cycle_is_kept() -> None:
    _, found = search_well([Cycle(100, 0.02), Cycle(3, 0.3)], momentum=0.9, climbing=False)
    assert found.cycles[1].max_energy > found.cycles[0].max_energy
    assert found.origin == "cycle 1"
    assert found.max_energy == found.cycles[0].max_energy
    assert found.perp_grad_norm == found.cycles[0].perp_grad_norm


@pytest.mark.parametrize("steps", [0, 1, 12])
def test_no_budget_ends_above_the_straight_line_or_a_start(steps: int) -> None:
    well, found = search_well([Cycle(steps, 0.02)])
    assert found.max_energy <= 5
    t = torch.linspace(0, 1, 9, dtype=F64)
    arc = torch.zeros(9, 50, dtype=F64)
    arc[:, 0], arc[:, 1] = 2 * t - 1, 3 * t * (1 - t)
    a, b = well.ends()
    start = torch.cat([a[None], (arc @ well.Q.T)[1:-1], b[None]])
    height = well.dense(refine(start, 9)).max().item()
    _, found = search_well([Cycle(steps, 0.02)], start=start)
    assert found.max_energy <= height + 1e-12 < 5
    assert found.cycles[0].pivots == 9


def test_an_empty_schedule_compares_what_is_given() -> None:
    _, found = search_well([])
    assert (found.origin, found.grad_evals, found.cycles) == ("straight line", 0, ())
    assert found.max_energy == pytest.approx(5, abs=1e-12)
    assert found.stop_reason == "the schedule has no cycles"


# --- insertion ------------------------------------------------------------------------------------


def test_pivots_go_where_the_path_rises_most_above_the_chord() -> None:
    pivots = torch.tensor([[0.0], [4.0], [8.0], [12.0]], dtype=F64)
    # Excess over the chord: none, 2 at its third part, 6 at its first; the range is 10.
    energies = torch.tensor([0.0, 1, 2, 3, 4, 3, 2, 3, 0, 8.5, 5, 7.5, 10], dtype=F64)
    one = insert_pivots(pivots, energies, threshold=0.1, limit=1)
    assert one[:, 0].tolist() == [0, 4, 8, 9, 12]
    two = insert_pivots(pivots, energies, threshold=0.1, limit=2)
    assert two[:, 0].tolist() == [0, 4, 7, 8, 9, 12]
    strict = insert_pivots(pivots, energies, threshold=0.3, limit=2)
    assert strict[:, 0].tolist() == [0, 4, 8, 9, 12]
    assert torch.equal(insert_pivots(pivots, energies, threshold=0.1, limit=0), pivots)


def test_nothing_is_inserted_into_a_well_resolved_or_flat_path() -> None:
    pivots = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for energies in (torch.linspace(0, 1, 17), torch.ones(17), -(torch.linspace(-1, 1, 17) ** 2)):
        grown = insert_pivots(pivots, energies.double(), threshold=0.1, limit=2)
        assert torch.equal(grown, pivots)


def test_relaxation_keeps_the_resolution_where_pivots_were_added() -> None:
    _, found = search_well([Cycle(100, 0.02)] * 3, threshold=0.02, climbing=False)
    lengths = segment_lengths(found.pivots)
    assert len(found.pivots) > 5
    assert lengths.max() / lengths.min() > 1.5


# --- what is said and counted ---------------------------------------------------------------------


def test_evaluations_are_counted_exactly_and_steps_run_on_across_cycles() -> None:
    well = CurvedWell()
    points: list[int] = []

    def dense(p: Tensor) -> Tensor:
        points.append(len(p))
        return well.dense(p)

    a, b = well.ends()
    cycles = [Cycle(30, 0.02)] * 3
    found = auto_neb(well, dense, a, b, schedule=cycles, between=4, baselines=[line(a, b)])
    assert found.grad_evals == sum(n for _, n in well.calls)
    assert [step for step, _ in well.calls] == list(range(len(well.calls)))
    assert found.energy_evals == sum(points)
    assert max(points) == 5  # one segment at a time
    assert len(found.energies) == len(found.alphas) == (len(found.pivots) - 1) * 5 + 1


def line(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b])


def test_alphas_are_shares_of_the_arc_length_of_the_dense_points() -> None:
    well, found = search_well([Cycle(60, 0.02)] * 2, between=4)
    steps = segment_lengths(refine(found.pivots, 4)).cumsum(0)
    torch.testing.assert_close(found.alphas[1:], steps / steps[-1])
    assert (found.alphas[0], found.alphas[-1]) == (0, 1)
    torch.testing.assert_close(found.energies, well.dense(refine(found.pivots, 4)))


def test_budget_and_convergence_are_said() -> None:
    _, found = search_well([Cycle(12, 0.02)] * 2)
    assert not found.converged
    assert found.stop_reason.startswith("cycle 2 of 2: budget of 12 steps spent")
    _, found = search_well([Cycle(1000, 0.02)] * 2)
    assert found.converged
    assert found.stop_reason.startswith("cycle 2 of 2: converged")
    assert found.perp_grad_norm <= 1e-6


def test_a_non_finite_energy_ends_the_search_with_the_best_path_so_far() -> None:
    well = CurvedWell()
    a, b = well.ends()

    def energy(p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        energies, gradients = well(p, step)
        return energies, gradients * (math.nan if step == 150 else 1.0)

    found = auto_neb(energy, well.dense, a, b, schedule=[Cycle(100, 0.02)] * 3, tol=0, momentum=0)
    assert found.max_energy < 1.01
    assert len(found.cycles) == 2
    expected = "cycle 2 of 3: gradient is not finite at pivot 1 of 7 after 49 steps; lower lr=0.02"
    assert found.stop_reason == expected


def test_an_infinite_straight_line_yields_to_a_finite_baseline() -> None:
    well = CurvedWell()
    a, b = well.ends()

    def dense(p: Tensor) -> Tensor:
        x, y = (p @ well.Q)[:, :2].T
        return torch.where((x.abs() < 0.9) & (y < 0.1), torch.inf, well.dense(p))

    over = 2 * well.Q[:, 1]
    baseline = torch.stack([a, over - well.Q[:, 0], over + well.Q[:, 0], b])
    found = auto_neb(well, well.dense, a, b, schedule=[], baselines=[baseline])
    assert found.origin == "straight line"
    found = auto_neb(well, dense, a, b, schedule=[Cycle(9, 0.02)], baselines=[baseline], between=1)
    assert found.stop_reason == "energy is inf between pivots 1 and 2 of the straight line"
    assert (found.origin, found.grad_evals) == ("baseline 1", 0)
    assert math.isfinite(found.max_energy)


def test_progress_runs_through_all_cycles() -> None:
    seen: list[tuple[int, int, str]] = []
    search_well([Cycle(3, 0.02), Cycle(5, 0.02)], report=lambda *line: seen.append(line))
    assert [done for done, _, _ in seen] == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]
    assert {total for _, total, _ in seen} == {8}
    assert seen[-1][2].startswith("cycle 2: ")


# --- invariants -----------------------------------------------------------------------------------


def test_inputs_stay_endpoints_are_bitwise_kept_and_runs_repeat() -> None:
    well = CurvedWell()
    a, b = (end.requires_grad_() for end in well.ends())
    start = refine(torch.stack([a, b]), 4).detach()
    copies = [x.detach().clone() for x in (a, b, start)]
    first, second = (
        auto_neb(well, well.dense, a, b, schedule=[Cycle(20, 0.02)] * 2, start=start)
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip((a, b, start), copies, strict=True))
    assert torch.equal(first.pivots, second.pivots) and torch.equal(first.energies, second.energies)
    assert torch.equal(first.pivots[[0, -1]], torch.stack(copies[:2]))
    assert not first.pivots.requires_grad


def test_paths_from_a_to_b_and_from_b_to_a_are_the_same() -> None:
    well = CurvedWell()
    a, b = well.ends()
    cycles = [Cycle(100, 0.02)] * 3
    forth, back = (
        auto_neb(well, well.dense, *ends, schedule=cycles, momentum=0.5)
        for ends in ((a, b), (b, a))
    )
    assert back.max_energy == pytest.approx(forth.max_energy, abs=1e-6)
    torch.testing.assert_close(back.pivots.flip(0), forth.pivots, atol=1e-3, rtol=0)


def test_bad_searches_are_refused() -> None:
    well = CurvedWell()
    a, b = well.ends()

    def search(a: Tensor, b: Tensor, **options) -> None:
        auto_neb(well, well.dense, a, b, schedule=[], **options)

    with pytest.raises(InputError, match="same point"):
        search(a, a.clone())
    with pytest.raises(InputError, match="one length"):
        search(a, b[:-1])
    with pytest.raises(InputError, match="initial_pivots=0"):
        search(a, b, initial_pivots=0)
    with pytest.raises(InputError, match="start does not run from a to b"):
        search(a, b, start=torch.stack([b, a]))
    with pytest.raises(InputError, match=r"baseline 2 of shape \(50,\)"):
        search(a, b, baselines=[torch.stack([a, b]), a])
    with pytest.raises(InputError, match="coincide"):
        search(a, b, start=torch.stack([a, a, b]))
