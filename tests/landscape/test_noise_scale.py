"""The noise scale: a linear model whose noise is known, every draw of a split, other probes."""

from __future__ import annotations

import math

import pytest
import torch

from lsa.landscape import Landscape, flatten
from lsa.landscape.noise_scale import BLOCK, NoiseScale, draw, gram, of_batches, of_gram
from lsa.probe import find
from lsa.runtime.errors import InputError

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 0.5 * (outputs - targets).square().mean()


def regression(n: int, d: int, rng: torch.Generator) -> tuple[Landscape, torch.Tensor]:
    """x ~ N(0, I), y = s·noise, so the true weights are 0; the loss ½ r² at the weights δ."""
    with torch.random.fork_rng():
        model = torch.nn.Linear(d, 1, bias=False).double()
    x = torch.randn(n, d, generator=rng, dtype=F64)
    y = 0.5 * torch.randn(n, 1, generator=rng, dtype=F64)
    return Landscape(model, x, y, half_square), torch.full((d,), 0.1, dtype=F64)


def tiny(n: int = 60) -> tuple[Landscape, torch.Tensor]:
    rng = generator(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    x = torch.randn(n, 5, generator=rng, dtype=F64)
    y = torch.randint(3, (n,), generator=rng)
    return Landscape(model.double(), x, y), flatten(model)


def measure(
    landscape: Landscape, theta: torch.Tensor, rng: torch.Generator, **options: int
) -> NoiseScale:
    drawn = draw(landscape.n_samples, rng, **options)
    return of_batches(map(landscape.subset, drawn), theta, landscape.n_samples)


@pytest.mark.parametrize("d", [1, BLOCK - 1, BLOCK, 20 * BLOCK + 5])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-7), (F64, 1e-14)])
def test_products_of_gradients_are_those_of_float64(d, dtype, error):
    gradients = torch.randn(8, d, generator=generator(), dtype=F64).to(dtype) + 0.3
    exact = gradients.double() @ gradients.double().T
    lengths = exact.diagonal().sqrt()
    found = gram(gradients)
    assert found.dtype == F64
    assert ((found - exact).abs() / torch.outer(lengths, lengths)).max() <= error


def test_of_a_linear_model_with_known_noise_both_are_unbiased_and_the_errors_are_true():
    # g = x (x·δ − s·noise), so G = δ and E|g|² = (d + 2)|δ|² + d s² (Isserlis).
    d, s = 4, 0.5
    delta = d * 0.1**2
    truth = {"gradient_squared": delta, "trace": (d + 2) * delta + d * s**2 - delta}
    rng = generator()
    # A new data set each time: "the split" is then the distribution itself.
    runs = []
    for _ in range(400):
        landscape, theta = regression(48, d, rng)
        runs.append(measure(landscape, theta, rng, parts=8, size=6))
    for name, value in truth.items():
        values = torch.tensor([getattr(run, name).value for run in runs], dtype=F64)
        assert abs(values.mean() - value) < 4 * values.std() / len(runs) ** 0.5, name
        errors = torch.tensor([getattr(run, name).error for run in runs], dtype=F64)
        # The jackknife errs upwards; from 8 batches its square is known to about a half.
        assert 0.9 < errors.square().mean().sqrt() / values.std() < 1.5, name


def test_over_many_draws_the_mean_is_the_number_of_sgd_noise():
    landscape, theta = tiny()
    n = landscape.n_samples
    probe = find("sgd_noise")(landscape=landscape, theta=theta, k=1, probes=0).metrics
    truth = {
        "trace": probe["trace_c"].value * n / (n - 1),
        "gradient_squared": probe["gradient_squared"].value,
    }
    rng = generator()
    runs = [measure(landscape, theta, rng, parts=4, size=3) for _ in range(600)]
    for name, value in truth.items():
        values = torch.tensor([getattr(run, name).value for run in runs], dtype=F64)
        assert abs(values.mean() - value) < 4 * values.std() / len(runs) ** 0.5, name


def test_with_every_sample_as_a_batch_of_its_own_it_is_that_of_sgd_noise_exactly():
    landscape, theta = tiny()
    n, theta = landscape.n_samples, 3 * theta  # where the gradient is told from zero
    probe = find("sgd_noise")(landscape=landscape, theta=theta, k=1, probes=0).metrics
    found = measure(landscape, theta, generator(), parts=n, size=1)
    assert found.trace.value == pytest.approx(probe["trace_c"].value * n / (n - 1), rel=1e-10)
    assert found.gradient_squared.value == pytest.approx(probe["gradient_squared"].value, rel=1e-10)
    assert found.scale.value == pytest.approx(probe["noise_scale"].value, rel=1e-10)
    # Yin et al. 2018: ∑|gᵢ|²/|∑gᵢ|² of the split.
    g = torch.cat(list(landscape.sample_gradients(theta)))
    diversity = (g.square().sum() / g.sum(0).square().sum()).item()
    assert found.diversity.value == pytest.approx(diversity, rel=1e-10)


def test_two_sizes_of_batch_give_mccandlishs_estimators():
    # Equations A.2 and A.3 of the paper, for B_small = b and B_big = m b.
    m, b = 5, 7
    g = torch.randn(m, 30, generator=generator(), dtype=F64) + 1
    found = of_gram(g @ g.T, b, 1000)
    small, big = g.square().sum(1).mean().item(), g.mean(0).square().sum().item()
    signal = (m * b * big - b * small) / (m * b - b)
    trace = (small - big) / (1 / b - 1 / (m * b))
    assert found.gradient_squared.value == pytest.approx(signal, rel=1e-12)
    assert found.trace.value == pytest.approx(trace, rel=1e-12)
    assert found.scale.value == pytest.approx(trace / signal, rel=1e-12)


def test_errors_are_the_jackknifes():
    m, b, n = 6, 2, 100
    g = torch.randn(m, 9, generator=generator(), dtype=F64) + 3

    def values(rows: torch.Tensor) -> NoiseScale:
        return of_gram(rows @ rows.T, b, n)

    left_out = [values(torch.cat([g[:i], g[i + 1 :]])) for i in range(m)]
    for name in ("trace", "gradient_squared"):
        each = torch.tensor([getattr(one, name).value for one in left_out], dtype=F64)
        expected = ((m - 1) * each.var(correction=0)).sqrt().item()
        assert getattr(values(g), name).error == pytest.approx(expected, rel=1e-9), name


def test_where_noise_hides_the_gradient_there_is_no_scale():
    g = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=F64)
    found = of_gram(g @ g.T, 1, 50)
    assert found.gradient_squared.value < 0
    assert math.isnan(found.scale.value) and math.isnan(found.diversity.value)
    assert found.scale.high == math.inf and found.diversity.high == 1
    assert {"noise_scale", "noise_scale_high", "gradient_diversity"}.isdisjoint(found.numbers())


@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0, 3.0])
def test_a_scale_that_is_printed_is_never_far_above_the_truth(signal):
    """Of 8 batches in 50 dimensions: |G| hidden in the noise, hardly told from zero, and clear."""
    m, size, d, n = 8, 4, 50, 10_000
    g = torch.zeros(d, dtype=F64)
    g[0] = signal
    truth = d / max(signal**2, 1e-30)
    rng, printed = generator(), []
    for _ in range(400):
        batches = g + torch.randn(m, d, generator=rng, dtype=F64) / size**0.5
        printed.append(of_gram(batches @ batches.T, size, n).scale.value)
    values = torch.tensor(printed, dtype=F64)
    told = values[values.isfinite()]
    if signal == 0:
        assert len(told) <= 0.05 * 400
    else:
        assert (told < 3 * truth).all()
    if signal == 3:
        assert len(told) >= 0.95 * 400
        assert told.mean().item() == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize(("parts", "size"), [(2, 5), (4, 0), (8, 10)])
def test_impossible_draws_are_refused(parts, size):
    landscape, theta = tiny()
    with pytest.raises(InputError, match=f"parts={parts} of size={size} out of 60 samples"):
        measure(landscape, theta, generator(), parts=parts, size=size)
