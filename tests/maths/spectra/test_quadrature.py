"""Stochastic Lanczos quadrature against exact moments, planted spectra and random matrices."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from spectra import interval
from torch import Tensor

from lsa.maths.spectra.krylov import gram_error, orthogonalise
from lsa.maths.spectra.quadrature import Quadrature, spectral_density
from lsa.maths.spectra.rules import gauss_rule, sign_masses, tridiagonalise
from lsa.runtime.errors import InputError

F64 = {"dtype": torch.float64}
OUTLIERS = [100.0, 60, 45, 38, 30, 25, 21, 18, 15, 12]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@cache
def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=100 + seed)).Q


def rotated(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A dense matrix. A diagonal one is no test: random signs see all its eigenvalues alike."""
    Q = rotation(len(spectrum), seed)
    return (Q * spectrum) @ Q.T


def planted(d: int = 2000, outliers: list[float] | None = None) -> Tensor:
    """Isolated large eigenvalues, a bulk at zero, a few negative ones, the last at −3."""
    top = torch.tensor(OUTLIERS if outliers is None else outliers, dtype=torch.float64)
    bulk = 0.3 * normal(d - len(top) - 1).abs()
    bulk[:29] *= -1.7
    return torch.cat([top, bulk, torch.tensor([-3.0]).double()])


def semicircle(d: int, seed: int = 0) -> Tensor:
    A = normal(d, d, seed=seed)
    return torch.linalg.eigvalsh((A + A.T) / math.sqrt(2 * d))


def wishart(d: int, n: int, seed: int = 0) -> Tensor:
    X = normal(d, n, seed=seed)
    return torch.linalg.eigvalsh(X @ X.T / n)


# --- the recurrence -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [30, 60, 90, 150])
def test_planted_spectrum_has_no_ghosts(steps: int) -> None:
    spectrum = planted()
    nodes, _ = gauss_rule(*tridiagonalise(lambda v: spectrum * v, normal(2000, seed=1), steps))
    assert int((nodes > 10).sum()) == 10
    assert float(nodes[-1]) == pytest.approx(100, rel=1e-4)
    assert float(nodes[0]) == pytest.approx(-3, rel=1e-4)


def test_coefficients_are_the_projection_of_the_operator() -> None:
    """T = Vᵀ A V with V rebuilt by Gram–Schmidt on the Krylov sequence."""
    A, v = rotated(torch.linspace(-1, 3, 40).double()), normal(40)
    alpha, beta = tridiagonalise(lambda x: A @ x, v, 6)
    V = torch.zeros(0, 40, dtype=torch.float64)
    w = v
    for _ in range(6):
        w, _ = orthogonalise(w, V)
        V = torch.cat([V, (w / w.norm())[None]])
        w = A @ V[-1]
    T = V @ A @ V.T
    assert gram_error(V) < 1e-14
    assert torch.allclose(T.diagonal(), alpha, atol=1e-12)
    assert torch.allclose(T.diagonal(1), beta[:-1], atol=1e-12)


@pytest.mark.parametrize("m", [1, 3, 8])
def test_moments_are_exact_up_to_2m_minus_1_and_not_beyond(m: int) -> None:
    A, v = rotated(planted(300, [3.0, 2.0])), normal(300, seed=2)
    v = v / v.norm()
    nodes, weights = gauss_rule(*tridiagonalise(lambda x: A @ x, v, m))

    def error(power: int) -> float:
        exact = float(v @ torch.linalg.matrix_power(A, power) @ v)
        return abs(float((weights * nodes**power).sum()) - exact) / abs(exact)

    assert max(error(p) for p in range(2 * m)) < 1e-12
    assert error(2 * m) > 1e-10


def test_all_steps_give_the_dense_spectrum() -> None:
    A = rotated(torch.linspace(-1, 3, 60).double())
    nodes, weights = gauss_rule(*tridiagonalise(lambda x: A @ x, normal(60), 60))
    assert torch.allclose(nodes, torch.linalg.eigvalsh(A), atol=1e-8, rtol=0)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)


def test_breakdown_ends_the_recurrence() -> None:
    alpha, beta = tridiagonalise(lambda v: 2 * v, normal(50), 20)
    assert alpha.tolist() == pytest.approx([2])
    assert float(beta[0]) == pytest.approx(0, abs=1e-12)


# --- the density --------------------------------------------------------------------------------


def test_two_clusters_hold_half_the_mass_each() -> None:
    d = 400
    A = rotated(torch.cat([torch.ones(d // 2), 5 * torch.ones(d // 2)]).double())
    q = spectral_density(lambda v: A @ v, d, rng=generator(), probes=10, steps=20, **F64)
    near = ((q.nodes - 1).abs() < 1e-8) | ((q.nodes - 5).abs() < 1e-8)
    assert near.all()
    assert torch.allclose(q.weights.sum(1), torch.ones(10).double(), atol=1e-12)
    # vᵀPv/d of a random projector P of rank d/2: variance 2(d/2 − ∑Pᵢᵢ²)/d² = 1/(2d)
    mass = float((q.weights * (q.nodes < 3)).sum(1).mean())
    assert mass == pytest.approx(0.5, abs=4 * math.sqrt(1 / (2 * d) / 10))
    density = q.density()
    total = torch.trapezoid(density.value, density.x)
    lower = torch.trapezoid(density.value * (density.x < 3), density.x)
    assert float(total) == pytest.approx(1, abs=1e-6)
    assert float(lower) == pytest.approx(mass, abs=1e-6)


def test_density_of_the_semicircle() -> None:
    d = 1000
    spectrum = semicircle(d)
    q = spectral_density(lambda v: spectrum * v, d, rng=generator(), steps=40, dtype=torch.float32)
    density = q.density(-2.4, 2.4)
    law = (4 - density.x.clamp(-2, 2).square()).sqrt() / (2 * math.pi)
    assert density.width == pytest.approx(4.8 / 40)
    # smoothing moves mass over one width at either edge, where φ rises to φ(2 − width) ≈ 0.11
    assert (
        float(torch.trapezoid((density.value - law).abs(), density.x))
        < 2 * 0.11 * density.width * 2
    )


def test_error_of_the_density_covers_the_truth() -> None:
    d = 600
    spectrum = semicircle(d)
    A = rotated(spectrum)
    q = spectral_density(lambda v: A @ v, d, rng=generator(), probes=10, steps=60, **F64)
    density = q.density(-1.5, 1.5, width=0.2)
    kernel = torch.exp(-0.5 * ((density.x[:, None] - spectrum) / density.width).square())
    truth = kernel.mean(1) / (density.width * math.sqrt(2 * math.pi))
    z = (density.value - truth) / density.error
    # E z² = 9/7 for Student's t; some 3/0.2 = 15 independent points: standard deviation about 0.7
    assert 0.1 < float(z.square().mean()) < 1.3 + 4 * 0.7


def test_density_of_a_multiple_of_the_identity() -> None:
    q = spectral_density(lambda v: 3 * v, 50, rng=generator(), probes=2, **F64)
    assert q.products == 2
    density = q.density(points=2001)
    assert float(torch.trapezoid(density.value, density.x)) == pytest.approx(1, abs=1e-6)
    assert float(density.x[density.value.argmax()]) == pytest.approx(3, abs=1e-3)
    assert (density.error == 0).all()


def test_a_single_probe_has_no_spread_but_a_bound() -> None:
    q = spectral_density(lambda v: v, 20, rng=generator(), probes=1, **F64)
    assert q.trace.error == pytest.approx(math.sqrt(2 * 20))
    assert q.effective_rank.error == pytest.approx(math.sqrt(2 * 20))  # all eigenvalues are 1
    assert q.density().error.isnan().all()
    assert q.trace.samples == 1


# --- numbers read from the same runs ------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_trace_norm_and_negative_mass_within_their_errors(seed: int) -> None:
    d = 500
    spectrum = torch.cat([torch.linspace(-3, -2, 100), torch.linspace(1, 4, 400)]).double()
    A = rotated(spectrum, seed)
    q = spectral_density(lambda v: A @ v, d, rng=generator(seed), probes=12, steps=40, **F64)
    rank = float(spectrum.sum() ** 2 / spectrum.square().sum())
    truths = (
        (q.trace, float(spectrum.sum())),
        (q.frobenius_squared, float(spectrum.square().sum())),
        (q.effective_rank, rank),
        (q.signs.negative, 0.2),
    )
    for estimate, truth in truths:
        low, high = interval(estimate, 0.999)
        assert low < truth < high
        assert 0 < estimate.error < 0.1 * truth
    variance = 2 * (spectrum.square().sum() - A.diagonal().square().sum()) / 12
    assert variance < q.trace.error**2 < 1.6 * variance  # a bound, which the diagonal makes loose


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 60, 80])
def test_bounds_on_the_signs_hold_for_the_measure_of_the_probe(steps: int) -> None:
    spectrum = torch.cat([semicircle(50), torch.zeros(10).double(), normal(20).exp()]).sort().values
    v = normal(80, seed=4)
    measure = v.square() / v.square().sum()
    for shift in torch.linspace(-8, 3, 100).tolist():
        moved = spectrum + shift
        T = tridiagonalise(lambda x, A=moved: A * x, v, steps)
        negative, zero, low, high = sign_masses(*T, 1e-12)
        assert low - 1e-9 <= float(measure[moved < -1e-9].sum())
        assert float(measure[moved < 1e-9].sum()) <= high + 1e-9
        assert low - 1e-12 <= negative <= negative + zero <= high + 1e-12


@pytest.mark.parametrize("shift", [0.0, 0.5, -1.0])
def test_the_negative_share_of_a_smooth_bulk(shift: float) -> None:
    spectrum = semicircle(600)
    A = rotated(spectrum) + shift * torch.eye(600, dtype=torch.float64)
    signs = spectral_density(lambda v: A @ v, 600, rng=generator(), steps=30, **F64).signs
    truth = float((spectrum < -shift).double().mean())
    # vᵀPv/d of a projector on a share p: variance 2p(1 − p)/d; and half a node of 30
    deviation = math.sqrt(2 * truth * (1 - truth) / 600 / 10)
    assert signs.negative.value == pytest.approx(truth, abs=4 * deviation + 1 / 60)
    assert signs.low < truth < signs.high
    assert signs.zero.value < 1 / 30
    assert signs.negative.error == pytest.approx(deviation, rel=0.7)  # of 10 values: 24 %


def low_rank(d: int, rank: int) -> Tensor:
    X = normal(d, rank, seed=7)
    return X @ X.T / rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "rank"), [(50, 3), (300, 3), (400, 60)])
def test_zero_eigenvalues_of_a_semidefinite_matrix_are_not_negative(d, rank, dtype) -> None:
    A = low_rank(d, rank).to(dtype)
    for steps in (40, 90):
        signs = spectral_density(
            lambda v: A @ v, d, rng=generator(), probes=5, steps=steps, dtype=dtype
        ).signs
        assert signs.negative.value == 0
        deviation = math.sqrt(2 * rank / d * (1 - rank / d) / d / 5)
        assert signs.zero.value == pytest.approx(1 - rank / d, abs=4 * deviation + 0.01)


def test_zeros_among_eigenvalues_of_both_signs_are_neither() -> None:
    """Two thirds are exactly 0; the rest are a few large ones and tails on either side."""
    spectrum = planted(600)
    spectrum[50:450] = 0
    A = rotated(spectrum)
    signs = spectral_density(lambda v: A @ v, 600, rng=generator(), steps=40, **F64).signs
    truth = float((spectrum < 0).double().mean())
    assert signs.negative.value == pytest.approx(truth, abs=0.02)
    assert signs.zero.value == pytest.approx(400 / 600, abs=0.05)


@pytest.mark.parametrize("k", [0, 5, 10])
def test_the_errors_of_three_probes_cover_and_known_eigenvectors_shrink_them(
    k: int, record_property
) -> None:
    spectrum = planted(300)
    Q = torch.linalg.qr(normal(300, 300, seed=3)).Q
    A = (Q * spectrum) @ Q.T
    known = (spectrum[:k], Q[:, :k])
    inside: dict[int, list[bool]] = {1: [], 2: []}
    errors = []
    for seed in range(100):
        q = spectral_density(
            lambda v: A @ v, 300, rng=generator(seed), probes=3, steps=20, known=known, **F64
        )
        for estimate, power in ((q.trace, 1), (q.frobenius_squared, 2)):
            truth = float((spectrum**power).sum())
            inside[power].append(abs(estimate.value - truth) <= 2 * estimate.error)
        errors.append(q.trace.error)
    # ±2 cover 95 % of normal sums; here few eigenvalues dominate, and 88 to 99 % were seen. The
    # spread of three probes would cover 82 % (Student's t with 2 degrees of freedom).
    for number, power in (("trace", 1), ("frobenius_squared", 2)):
        label = f"{number}, 3 vectors, {k} known eigenvectors"
        record_property("coverage", [label, "probes", "95 %", sum(inside[power]) / 100, 100])
    assert min(sum(inside[1]), sum(inside[2])) > 83
    rest = float(spectrum[k:].square().sum())
    assert sum(errors) / 100 == pytest.approx(math.sqrt(2 * rest / 3), rel=0.15)


def test_diagonal_operator_has_no_probe_error() -> None:
    spectrum = planted(200, [5.0])
    q = spectral_density(lambda v: spectrum * v, 200, rng=generator(), probes=3, steps=5, **F64)
    assert q.trace.value == pytest.approx(float(spectrum.sum()))
    assert q.frobenius_squared.value == pytest.approx(float(spectrum.square().sum()))


@pytest.mark.parametrize("kind", ["hessian-like", "semicircle", "low rank"])
def test_two_errors_of_the_effective_rank_cover_it_in_90_percent(
    kind: str, record_property
) -> None:
    spectrum = {
        "hessian-like": planted(200),
        "semicircle": semicircle(200) + 0.5,
        "low rank": torch.linalg.eigvalsh(low_rank(200, 20)),
    }[kind]
    A = rotated(spectrum)
    truth = float(spectrum.sum().square() / spectrum.square().sum())
    inside = 0
    for seed in range(100):
        rank = spectral_density(
            lambda v: A @ v, 200, rng=generator(seed), probes=5, steps=15, **F64
        ).effective_rank
        inside += abs(rank.value - truth) <= 2 * rank.error
    record_property("coverage", [f"effective_rank, {kind}", "probes", "90 %", inside / 100, 100])
    assert inside >= 90 - 3  # one deviation of 100 draws at 90 %


@pytest.mark.full
def test_two_errors_of_what_the_density_says_cover_it(record_property) -> None:
    """With ten random vectors."""
    spectrum = planted(300)
    A = rotated(spectrum)
    truth = {
        "trace": float(spectrum.sum()),
        "n_outliers": 10,
        "negative_share": float((spectrum < 0).double().mean()),
    }
    inside = dict.fromkeys(truth, 0)
    for seed in range(100):
        q = spectral_density(lambda v: A @ v, 300, rng=generator(seed), steps=40, **F64)
        told = (q.trace, q.outliers().count, q.signs.negative)
        for name, estimate in zip(truth, told, strict=True):
            inside[name] += abs(estimate.value - truth[name]) <= 2 * estimate.error + 1e-12
    for name, count in inside.items():
        record_property("coverage", [f"lanczos: {name}", "probes", "95 %", count / 100, 100])
    assert all(count >= 90 - 3 for count in inside.values())


# --- outliers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [40, 90])
@pytest.mark.parametrize(
    "outliers", [OUTLIERS, [8.0, 6, 5, 4.5, 4, 3.5, 3, 2.6, 2.3, 2.0], [9.0], []]
)
def test_planted_outliers_are_counted(outliers: list[float], steps: int) -> None:
    spectrum = planted(600, outliers)
    A = rotated(spectrum)
    q = spectral_density(lambda v: A @ v, 600, rng=generator(), probes=3, steps=steps, **F64)
    found = q.outliers()
    assert found.count.value == len(outliers)
    assert found.count.error == 0
    bulk = spectrum[len(outliers) :].max()
    assert float(bulk) * 0.8 < found.edge.value <= float(bulk) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "rank"), [(50, 3), (400, 3), (400, 9)])
def test_all_eigenvalues_beside_a_multiple_zero_are_outliers(d, rank, dtype) -> None:
    """The Krylov space ends after rank + 1 steps."""
    A = low_rank(d, rank).to(dtype)
    found = spectral_density(lambda v: A @ v, d, rng=generator(), probes=5, steps=40, dtype=dtype)
    outliers = found.outliers()
    assert outliers.count == (rank, 0, 5)
    assert abs(outliers.edge.value) < 1e-5 * float(found.nodes.max())


@pytest.mark.parametrize("spectrum", [[3.0] * 50, [0.0] * 50, [2.0] * 25 + [1.0] * 25])
def test_no_outliers_in_few_multiple_eigenvalues(spectrum: list[float]) -> None:
    A = rotated(torch.tensor(spectrum).double())
    found = spectral_density(lambda v: A @ v, 50, rng=generator(), probes=3, steps=40, **F64)
    assert found.outliers().count == (0, 0, 3)
    assert found.outliers().edge.value == pytest.approx(max(spectrum), abs=1e-12)


@pytest.mark.parametrize("steps", [30, 90])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "bulk",
    [
        lambda seed: wishart(400, 1000, seed),
        lambda seed: wishart(400, 200, seed),
        lambda seed: semicircle(400, seed),
    ],
    ids=["Marchenko-Pastur", "rank-deficient", "semicircle"],
)
def test_no_outliers_in_a_random_matrix(bulk, seed: int, steps: int) -> None:
    A = rotated(bulk(seed), seed)
    q = spectral_density(lambda v: A @ v, 400, rng=generator(seed), probes=3, steps=steps, **F64)
    assert q.outliers().count == (0, 0, 3)


def test_no_outliers_when_nearly_all_eigenvalues_are_resolved() -> None:
    A = rotated(semicircle(100))
    q = spectral_density(lambda v: A @ v, 100, rng=generator(), probes=3, **F64)
    assert q.outliers().count == (0, 0, 3)


def test_spikes_beside_a_random_matrix() -> None:
    spectrum = torch.cat([torch.tensor([5.0, 4.5, 4.2]).double(), wishart(400, 800)])
    A = rotated(spectrum)
    q = spectral_density(lambda v: A @ v, 403, rng=generator(), probes=3, **F64)
    assert q.outliers().count == (3, 0, 3)


def test_a_second_bulk_is_not_a_row_of_outliers() -> None:
    spectrum = torch.cat([semicircle(200) + 20, semicircle(800)])
    A = rotated(spectrum)
    q = spectral_density(lambda v: A @ v, 1000, rng=generator(), probes=3, **F64)
    assert q.outliers().count.value == 0


# --- boundary -----------------------------------------------------------------------------------


def test_steps_beyond_the_dimension_and_report() -> None:
    calls = []
    q = spectral_density(
        lambda v: torch.arange(4.0) * v,
        4,
        rng=generator(),
        probes=3,
        report=lambda done, total, text: calls.append((done, total)),
    )
    assert q.nodes.shape == (3, 4) and q.nodes.dtype == torch.float64
    assert torch.allclose(q.nodes, torch.arange(4.0).double().expand(3, 4), atol=1e-5)
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_shorter_rules_carry_no_extra_weight() -> None:
    nodes = torch.tensor([[1.0, 2], [2, 2]]).double()
    weights = torch.tensor([[0.5, 0.5], [1, 0]]).double()
    assert Quadrature(10, nodes, weights, 3).trace.value == pytest.approx(10 * (1.5 + 2) / 2)


def test_same_seed_same_rule() -> None:
    spectrum = planted(100, [4.0])
    one, two = (
        spectral_density(lambda v: spectrum * v, 100, rng=generator(3), probes=2, steps=9)
        for _ in range(2)
    )
    assert torch.equal(one.nodes, two.nodes) and torch.equal(one.weights, two.weights)


@pytest.mark.parametrize("options", [{"probes": 0}, {"steps": 0}, {"dimension": 0}])
def test_numbers_out_of_range(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        spectral_density(lambda v: v, **({"dimension": 5} | options), rng=generator())


def test_diverged_operator() -> None:
    with pytest.raises(InputError, match="not finite"):
        spectral_density(lambda v: v * math.nan, 5, rng=generator())


@pytest.mark.parametrize("options", [{"width": 0.0}, {"points": 1}, {"low": 3.0, "high": 2.0}])
def test_grid_out_of_range(options: dict) -> None:
    q = spectral_density(lambda v: torch.arange(5.0) * v, 5, rng=generator())
    with pytest.raises(InputError, match="choose low < high"):
        q.density(**options)
