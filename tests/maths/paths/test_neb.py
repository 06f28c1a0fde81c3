from __future__ import annotations

import math

import pytest
import torch
from potentials import F64, CurvedWell, MullerBrown
from torch import Tensor

from lsa.maths.paths.neb import Band, nudged_elastic_band
from lsa.maths.paths.polyline import length_ratio, refine, segment_lengths, tangents
from lsa.runtime.errors import InputError


def line(potential: MullerBrown | CurvedWell, pivots: int) -> Tensor:
    return refine(torch.stack(potential.ends()), pivots - 2)


def dense_max(potential: MullerBrown | CurvedWell, band: Band) -> float:
    return potential.dense(refine(band.pivots, 100)).max().item()


def relax_well(pivots: int, **options) -> tuple[CurvedWell, Band]:
    well = CurvedWell()
    options = {"steps": 1000, "lr": 0.02, "momentum": 0.5, "tol": 1e-6} | options
    return well, nudged_elastic_band(well, line(well, pivots), **options)


# --- known saddles --------------------------------------------------------------------------------


def test_muller_brown_minima_are_the_published_ones() -> None:
    potential = MullerBrown()
    energies, gradients = potential(torch.stack(potential.ends()))
    torch.testing.assert_close(energies, torch.tensor(potential.minima, dtype=F64))
    assert gradients.abs().max() < 1e-9


# The dense maximum of a polyline misses the saddle by its resolution; the three tolerances are
# what 12, 20 and 30 pivots are known to allow.
@pytest.mark.parametrize(("pivots", "off"), [(12, 0.05), (20, 0.02), (30, 0.01)])
def test_muller_brown_dense_maximum(pivots: int, off: float) -> None:
    potential = MullerBrown()
    band = nudged_elastic_band(potential, line(potential, pivots), steps=1000, lr=2e-4, momentum=0)
    assert band.stop == "converged"
    assert dense_max(potential, band) == pytest.approx(potential.saddle, abs=off)


def test_too_few_pivots_miss_the_saddle() -> None:
    potential = MullerBrown()
    band = nudged_elastic_band(potential, line(potential, 8), steps=1000, lr=2e-4, momentum=0)
    assert band.stop == "converged"  # and yet the pivots are far below, the polyline far above
    assert band.energies.max().item() == pytest.approx(-52.03, abs=0.01)
    assert dense_max(potential, band) == pytest.approx(-37.10, abs=0.01)


@pytest.mark.parametrize("pivots", [8, 12])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_climbing_pivot_finds_the_muller_brown_saddle(pivots: int, momentum: float) -> None:
    potential = MullerBrown()
    band = nudged_elastic_band(
        potential,
        line(potential, pivots),
        steps=2000,
        lr=2e-4,
        momentum=momentum,
        climbing=True,
    )
    assert band.stop == "converged"
    # |E − E_saddle| ≤ tol²/2|λ|, with the curvatures λ = −751 and 490 of the saddle.
    assert band.energies.max().item() == pytest.approx(potential.saddle, abs=2e-9)


@pytest.mark.parametrize("pivots", [5, 7, 15])
@pytest.mark.parametrize("options", [{}, {"climbing": True}])
def test_minimax_of_the_curved_well_is_one(pivots: int, options: dict) -> None:
    well, band = relax_well(pivots, **options)
    assert well.dense(line(well, 101)).max().item() == pytest.approx(5, abs=1e-12)
    assert band.stop == "converged"
    assert band.perp_grad_norm <= 1e-6
    assert dense_max(well, band) == pytest.approx(1, abs=1e-9)


def test_even_pivots_straddle_the_saddle_unless_one_climbs() -> None:
    well, band = relax_well(8)
    assert band.energies.max().item() == pytest.approx(0.9115, abs=1e-4)  # below the saddle …
    assert dense_max(well, band) == pytest.approx(1.0082, abs=1e-4)  # … and above it
    well, band = relax_well(8, climbing=True)
    assert band.energies.max().item() == pytest.approx(1, abs=1e-9)
    assert dense_max(well, band) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("pivots", [5, 9])
def test_string_method_finds_the_same_path(pivots: int) -> None:
    well, string = relax_well(pivots, method="string", lr=1e-3, momentum=0.9, steps=600)
    _, band = relax_well(pivots)
    assert dense_max(well, string) == pytest.approx(1, abs=1e-6)
    assert (string.pivots - band.pivots).norm(dim=1).max() < 1e-2


def test_momentum_does_not_build_up_along_the_path() -> None:
    # Across the path, heavy ball answers the string's bias with a force 1/(1−μ) = 10 times larger,
    # so a tenth remains. Kept along the path as well, it would make every move 10 times longer.
    plain, heavy = (
        relax_well(9, method="string", momentum=momentum, steps=500)[1] for momentum in (0.0, 0.9)
    )
    assert heavy.perp_grad_norm == pytest.approx(plain.perp_grad_norm / 10, rel=0.1)


def test_bias_of_the_string_method_is_of_first_order_in_the_rate() -> None:
    coarse, fine = (
        relax_well(9, method="string", lr=lr, momentum=0.0, steps=300)[1] for lr in (0.02, 0.01)
    )
    assert coarse.stop == fine.stop == "budget"
    assert coarse.perp_grad_norm / fine.perp_grad_norm == pytest.approx(2, rel=0.1)


# --- spacing --------------------------------------------------------------------------------------


def test_pivots_are_spaced_evenly() -> None:
    _, band = relax_well(9)
    lengths = segment_lengths(band.pivots)
    assert lengths.max() / lengths.min() < 1 + 1e-4


def test_spacing_is_kept_on_both_sides_of_a_climbing_pivot() -> None:
    c = torch.tensor([1.0, 2, 3, 1, 1, 2], dtype=F64)
    _, band = relax_well(7, spacing=c)
    lengths = segment_lengths(band.pivots)
    # Chords are at most their arc; the bend of the path is worth a few per cent.
    torch.testing.assert_close(lengths / lengths.sum(), c / c.sum(), atol=0, rtol=0.05)
    _, band = relax_well(7, spacing=c, climbing=True)
    peak = int(band.energies.argmax())
    for part in (slice(0, peak), slice(peak, None)):
        share = segment_lengths(band.pivots)[part]
        torch.testing.assert_close(share / share.sum(), c[part] / c[part].sum(), atol=0, rtol=0.05)


def test_no_pivot_climbs_towards_a_higher_endpoint() -> None:
    slope = torch.tensor([1.0, 0.0], dtype=F64)  # no saddle: the energy rises all the way to b

    def energy(p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return p @ slope + p[:, 1] ** 2, slope + 2 * p * torch.tensor([0.0, 1.0], dtype=F64)

    path = refine(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=F64), 4)
    path[2, 1] = 0.5
    band = nudged_elastic_band(energy, path, steps=500, lr=0.05, climbing=True)
    assert band.stop == "converged"
    assert length_ratio(band.pivots) == pytest.approx(1, abs=1e-3)
    assert segment_lengths(band.pivots).min() > 0.19


# --- what is said and counted ---------------------------------------------------------------------


def test_budget_stop_is_said() -> None:
    _, band = relax_well(5, steps=12)
    assert (band.stop, band.steps) == ("budget", 12)
    assert band.stop_reason.startswith("budget of 12 steps spent: gradient across")
    assert band.perp_grad_norm > 1e-6


def test_convergence_is_said_and_ends_early() -> None:
    _, band = relax_well(5)
    assert band.stop == "converged"
    assert band.steps < 1000
    assert band.stop_reason.startswith("converged")


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 12}, {"tol": 1e-3}])
def test_gradients_are_counted_exactly_and_steps_numbered(options: dict) -> None:
    well, band = relax_well(6, first_step=100, **options)
    assert band.grad_evals == sum(points for _, points in well.calls) == 6 * (band.steps + 1)
    assert [step for step, _ in well.calls] == list(range(100, 101 + band.steps))


def test_residual_and_energies_belong_to_the_returned_pivots() -> None:
    for options in ({"steps": 7}, {"tol": 0.1}):
        well, band = relax_well(6, **options)
        energies, gradients = well(band.pivots)
        g, tau = gradients[1:-1], tangents(band.pivots, energies)
        across = g - (g * tau).sum(1, keepdim=True) * tau
        assert torch.equal(band.energies, well.dense(band.pivots))
        assert across.norm(dim=1).max().item() == pytest.approx(band.perp_grad_norm, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_energy_stops_with_one_line_that_says_where(bad: float) -> None:
    well = CurvedWell()

    def energy(p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        energies, gradients = well(p, step)
        energies[2] = bad if step == 3 else energies[2]
        return energies, gradients

    band = nudged_elastic_band(energy, line(well, 5), steps=10, lr=0.02)
    assert band.stop == "not finite"
    assert band.stop_reason == f"energy is {bad:g} at pivot 3 of 5 after 3 steps; lower lr=0.02"
    assert band.pivots.isfinite().all() and band.energies.isfinite().all()
    assert (band.steps, band.grad_evals) == (2, 20)


def test_a_diverging_relaxation_stops_by_itself() -> None:
    well, band = relax_well(7, lr=5.0)
    assert band.stop == "not finite"
    assert "lower lr=5" in band.stop_reason and "\n" not in band.stop_reason
    assert well.dense(band.pivots).isfinite().all()


def test_progress_is_reported() -> None:
    lines: list[tuple[int, int, str]] = []
    _, band = relax_well(5, steps=4, report=lambda *line: lines.append(line))
    assert [(done, total) for done, total, _ in lines] == [(i, 4) for i in range(5)]
    assert f"{band.perp_grad_norm:.3g}" in lines[-1][2]


# --- invariants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"climbing": True}, {"method": "string"}])
def test_inputs_stay_and_endpoints_are_bitwise_kept(options: dict) -> None:
    well = CurvedWell()
    path = line(well, 6).float()
    path[0, 3] = -0.0
    before = path.clone()

    def energy(p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return tuple(x.float() for x in well(p.double()))  # type: ignore[return-value]

    band = nudged_elastic_band(energy, path, steps=20, lr=0.02, **options)
    assert torch.equal(path.view(torch.int32), before.view(torch.int32))
    ends = band.pivots[[0, -1]].view(torch.int32)
    assert torch.equal(ends, path[[0, -1]].view(torch.int32))
    assert band.pivots.dtype == torch.float32
    assert not torch.equal(band.pivots[1:-1], path[1:-1])


@pytest.mark.parametrize("options", [{}, {"climbing": True}, {"method": "string"}])
def test_reversing_the_path_reverses_the_result(options: dict) -> None:
    potential = MullerBrown()
    path, options = line(potential, 9), {"steps": 100, "lr": 1e-4} | options
    forth = nudged_elastic_band(potential, path, **options)
    back = nudged_elastic_band(potential, path.flip(0), **options)
    torch.testing.assert_close(back.pivots.flip(0), forth.pivots, atol=1e-9, rtol=0)
    assert back.steps == forth.steps


def test_the_search_is_deterministic_and_works_with_autograd() -> None:
    well = CurvedWell()

    def energy(p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        leaf = p.detach().requires_grad_()
        energies = well(leaf)[0]
        return energies, torch.autograd.grad(energies.sum(), leaf)[0]

    path = line(well, 6).requires_grad_()
    options = {"steps": 50, "lr": 0.02}
    first, second = (nudged_elastic_band(energy, path, **options) for _ in range(2))
    assert torch.equal(first.pivots, second.pivots)
    assert not first.pivots.requires_grad and not first.energies.requires_grad
    closed_form = nudged_elastic_band(well, path, **options)
    torch.testing.assert_close(first.pivots, closed_form.pivots, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps ≥ 0"),
        ({"lr": 0.0}, "lr > 0"),
        ({"momentum": 1.0}, "momentum < 1"),
        ({"method": "strings"}, "choose 'neb' or 'string'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        relax_well(5, **options)


def test_misshapen_paths_and_energies_are_refused() -> None:
    well = CurvedWell()
    with pytest.raises(InputError, match="P ≥ 3"):
        nudged_elastic_band(well, torch.stack(well.ends()), steps=1, lr=0.1)
    with pytest.raises(InputError, match=r"\(P,\) energies"):
        nudged_elastic_band(lambda p, _: (p[:, :1], p), line(well, 4), steps=1, lr=0.1)
