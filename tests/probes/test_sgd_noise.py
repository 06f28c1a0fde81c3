"""Gradient noise against closed forms, dense matrices and repeated draws of the data."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lsa.figures.sgd_noise import draw
from lsa.landscape import Landscape, flatten
from lsa.probe import Result
from lsa.probes.sgd_noise import sgd_noise
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def measure(landscape: Landscape, theta: Tensor, **options: Any) -> Result:
    options = {"k": 2, "probes": 4} | options
    return sgd_noise(landscape, theta, generator(), lambda *_: None, **options)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """No bias, weights not set: building one must not draw from the global state."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, dtype=torch.float64)


def half_square(outputs: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (outputs - y).square().mean()


class Planted(nn.Module):
    """ℓᵢ(w) = xᵢ·w + ½|w|²: gradients xᵢ + w, so that C is the covariance of x, and H = I."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w + 0.5 * self.w @ self.w)[:, None]


def planted(n: int, seed: int, mean: float = 0.0) -> tuple[Landscape, Tensor]:
    """C = diag(10, 1, …, 1), tr C = 109, G = (mean, 0, …)."""
    x = normal(n, 100, seed=seed)
    x[:, 0] *= 10**0.5
    x[:, 0] += mean
    model = Planted(torch.zeros(100, dtype=torch.float64))
    return Landscape(model, x, torch.zeros(n), lambda o, y: o.mean()), flatten(model)


def test_linear_regression_at_its_optimum_has_noise_proportional_to_curvature():
    n, noise = 20_000, 0.8
    x = normal(n, 4) * torch.tensor([2.0, 1.0, 0.7, 0.5], dtype=torch.float64)
    y = x @ normal(4, 1, seed=2) + noise * normal(n, 1, seed=3)
    model = linear(4, 1)
    landscape = Landscape(model, x, y, half_square, chunk=5000)
    theta = torch.linalg.lstsq(x, y).solution[:, 0]
    found = measure(landscape, theta).metrics
    ratio = found["noise_ratio"]
    assert ratio.value == pytest.approx(noise**2, abs=4 * ratio.errors["data"])
    assert ratio.errors["data"] < 0.05 * noise**2
    assert found["alignment"].value == pytest.approx(1, abs=0.01)
    assert found["top_cosine_squared"].value == pytest.approx(1, abs=0.01)


def softmax_at_its_truth(n: int, seed: int) -> tuple[Landscape, Tensor]:
    """Softmax regression whose labels are drawn from the model itself."""
    model = linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(normal(3, 3, seed=5))
        x = normal(n, 3, seed=seed) * torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
        y = torch.multinomial(model(x).softmax(1), 1, generator=generator(seed + 10_000))[:, 0]
    return Landscape(model, x, y, chunk=5000), flatten(model)


def test_a_well_specified_model_has_covariance_equal_to_hessian():
    found = measure(*softmax_at_its_truth(40_000, seed=6)).metrics
    ratio = found["noise_ratio"]
    assert ratio.value == pytest.approx(1, abs=4 * ratio.errors["data"])
    assert ratio.errors["data"] < 0.03
    assert found["alignment"].value == pytest.approx(1, abs=0.01)


@pytest.mark.full
def test_the_error_of_the_ratio_is_its_spread_over_draws_of_the_data():
    runs = [measure(*softmax_at_its_truth(1000, seed)).metrics["noise_ratio"] for seed in range(60)]
    spread = torch.tensor([run.value for run in runs]).std().item()
    reported = sum(run.errors["data"] for run in runs) / len(runs)
    assert reported == pytest.approx(spread, rel=0.35)  # a deviation from 60 draws is good to 9 %


@pytest.fixture(scope="module")
def net() -> tuple[Landscape, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    y = torch.randint(0, 3, (50,), generator=generator(2))
    return Landscape(model, normal(50, 5), y, chunk=16), flatten(model)


def dense(matvec: Any, d: int) -> Tensor:
    return torch.stack([matvec(e) for e in torch.eye(d, dtype=torch.float64)], dim=1)


def test_the_noise_of_sgd_iterates_is_what_the_covariance_predicts():
    """On ½|w|² with noise C/B, η small enough, iterates vary by η C/(B(2 − η)) (exact, B i.i.d.).

    The variance along the top eigenvector over S independent runs has relative error √(2/S).
    """
    n, batch, eta, steps, runs = 400, 4, 0.3, 60, 4000
    landscape, theta = planted(n, seed=3)
    found = measure(landscape, theta, k=1)
    u = torch.from_numpy(found.arrays["covariance_vectors"][:, 0])
    slopes = landscape.slopes(theta, u)  # of sample i at w = 0; at w it is this plus u·w
    w, rng = torch.zeros(runs, dtype=torch.float64), generator(5)
    for _ in range(steps):  # u·w alone: H = I keeps the directions apart
        drawn = slopes[torch.randint(n, (runs, batch), generator=rng)].mean(1)
        w = w - eta * (drawn + w)
    predicted = eta * found.metrics["lambda_c"].value / (batch * (2 - eta))
    assert w.var().item() == pytest.approx(predicted, rel=4 * (2 / runs) ** 0.5)


def test_without_random_vectors_there_is_no_alignment(net):
    found, whole = (measure(*net, k=1, probes=probes) for probes in (0, 4))
    assert {"alignment", "trace_hc", "trace_h", "norm_h", "norm_c"} < (
        whole.metrics.keys() - found.metrics.keys()
    )
    for name in ("lambda_c", "lambda_h", "noise_ratio", "trace_c"):
        assert found.metrics[name].value == pytest.approx(whole.metrics[name].value)
    assert len(draw(found, "title").axes) == 2


def test_every_number_agrees_with_gram_and_dense_matrices(net):
    landscape, theta = net
    g = torch.cat(list(landscape.sample_gradients(theta)))
    centred = g - g.mean(0)
    gram = torch.linalg.eigvalsh(centred @ centred.T / 50)
    C = centred.T @ centred / 50
    H = dense(landscape.hessian(theta), len(theta))
    found = measure(landscape, theta, k=3, tol=1e-8, probes=40)
    value = {name: metric.value for name, metric in found.metrics.items()}
    assert value["lambda_c"] == pytest.approx(gram[-1].item(), rel=1e-10)
    assert found.curves["covariance_eigenvalue"].y == pytest.approx(gram[-3:].flip(0).numpy())
    assert value["lambda_h"] == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-10)
    assert value["noise_ratio"] == pytest.approx(value["lambda_c"] / value["lambda_h"])
    mean = g.mean(0)
    # the identity tr C = mean |gᵢ|² − |g|²
    trace = (g.square().sum(1).mean() - mean @ mean).item()
    assert value["trace_c"] == pytest.approx(trace) == pytest.approx(C.trace().item())
    u = torch.linalg.eigh(H).eigenvectors[:, -1]
    assert value["noise_on_top_curvature"] == pytest.approx((u @ C @ u).item())
    signal = (mean @ mean).item() - trace / 49
    assert value["gradient_squared"] == pytest.approx(signal)
    truth = {
        "trace_hc": (H @ C).trace().item(),
        "trace_h": H.trace().item(),
        "norm_h": H.norm().item(),
        "norm_c": C.norm().item(),
        "alignment": ((H @ C).trace() / H.norm() / C.norm()).item(),
    }
    for name, expected in truth.items():
        error = found.metrics[name].errors["probes"]
        assert value[name] == pytest.approx(expected, abs=4 * error), name
        assert error < 0.1 * abs(expected)
    U, V = (torch.linalg.eigh(M).eigenvectors[:, -3:] for M in (C, H))
    assert value["subspace_overlap"] == pytest.approx((U.T @ V).square().sum().item() / 3)
    assert len(draw(found, "title").axes) == 2


@pytest.mark.parametrize("n", [50, 200])
def test_the_two_values_of_lambda_c_bracket_the_truth(n):
    runs = [measure(*planted(n, seed), k=1, probes=2).metrics for seed in range(12)]
    naive = sum(run["lambda_c"].value for run in runs) / len(runs)
    split = sum(run["lambda_c_split"].value for run in runs) / len(runs)
    assert split < 10 < naive
    # To first order a spike of 10 over a bulk of 1 is raised by λ ∑ 1/(λ − 1)/N = 10·99/9/N.
    assert naive - 10 == pytest.approx(110 / n, rel=0.6)


def test_a_wide_bracket_is_noted_and_a_narrow_one_is_not():
    wide = measure(*planted(50, seed=1), k=1, probes=2)
    narrow = measure(*planted(8000, seed=1, mean=1.0), k=1, probes=2)
    assert any("λ_C lies between" in note for note in wide.notes)
    assert not narrow.notes


def test_the_noise_scale_does_not_depend_on_the_number_of_samples():
    truth = 109 / 4**2
    for n in (50, 800):
        runs = [measure(*planted(n, seed, mean=4.0), k=1, probes=2).metrics for seed in range(12)]
        signals = torch.tensor([run["gradient_squared"].value for run in runs])
        assert signals.mean().item() == pytest.approx(16, abs=4 * (signals.std() / 12**0.5).item())
        scales = torch.tensor([run["noise_scale"].value for run in runs])
        assert scales.mean().item() == pytest.approx(truth, rel=0.25)


def test_no_noise_scale_where_the_gradient_is_lost_in_the_noise():
    landscape, theta = planted(50, seed=1)
    theta = -landscape.x.mean(0)  # the minimum: the mean gradient is zero
    found = measure(landscape, theta, k=1, probes=2)
    assert "noise_scale" not in found.metrics
    assert any("not told from zero" in note for note in found.notes)


@pytest.mark.full
def test_a_noise_scale_is_printed_only_where_the_gradient_is_told_from_zero():
    """G = 0 in 60 data sets: at most 5 % print a number; the bound in the note mostly holds."""
    printed = [
        "noise_scale" in measure(*planted(100, seed), k=1, probes=0).metrics for seed in range(60)
    ]
    assert sum(printed) <= 0.05 * 60
    bounds = []
    for seed in range(40):
        notes = measure(*planted(60, seed, mean=1.0), k=1, probes=0).notes
        bounds += [
            float(note.split("it is above ")[1].split()[0])
            for note in notes
            if "not told from zero" in note
        ]
    assert len(bounds) > 35
    assert sum(bound > 109 for bound in bounds) <= 0.025 * len(bounds)  # tr C/|G|²


def test_the_noise_scale_has_an_interval_in_place_of_a_standard_error():
    found = measure(*planted(200, 0, mean=4.0), k=1, probes=0)
    scale, low, high = (found[f"noise_scale{end}"] for end in ("", "_low", "_high"))
    assert not scale.errors and 0 < low.value < scale.value < high.value < 4 * scale.value
    assert high.value - scale.value > scale.value - low.value
    printed = [line for line in str(found).splitlines() if line.startswith("noise_scale")]
    assert len(printed) == 1 and re.search(r" samples +95 % interval \S+ to \S+$", printed[0])


def test_no_curvature_leaves_out_the_ratios_to_it():
    """A loss that is linear in θ: H = 0."""
    x = normal(30, 4)
    landscape = Landscape(linear(4, 1), x, torch.zeros(30), lambda o, y: o.mean())
    found = measure(landscape, torch.zeros(4, dtype=torch.float64))
    assert found.metrics["lambda_h"].value == 0
    assert {"noise_ratio", "anisotropy_gain", "alignment"}.isdisjoint(found.metrics)
    assert any("λ_H is not told from zero" in note for note in found.notes)
    C = torch.cov(x.T, correction=0)
    assert found.metrics["lambda_c"].value == pytest.approx(torch.linalg.eigvalsh(C)[-1].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_that_are_all_alike_have_no_noise(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    x = normal(1, 5).to(dtype).expand(20, 5)
    landscape = Landscape(model, x, torch.ones(20, dtype=torch.long))
    found = measure(landscape, flatten(model))
    assert {"anisotropy_gain", "alignment", "noise_ratio", "noise_scale"}.isdisjoint(found.metrics)
    assert any("all samples are alike" in note for note in found.notes)
    assert found.metrics["trace_c"].value < 1e-10
    assert found.metrics["lambda_h"].value > 0.1


@pytest.mark.parametrize("seed", range(8))
def test_a_single_parameter(seed):
    """C = 4 var x², H = 2 mean x² of ℓ = (wx − y)², at any seed: start vectors must not cancel."""
    x, y = normal(40, 1, seed=seed), normal(40, 1, seed=seed + 50)
    landscape = Landscape(linear(1, 1), x, y, nn.functional.mse_loss)
    found = sgd_noise(
        landscape, torch.ones(1, dtype=torch.float64), generator(seed), lambda *_: None, k=1
    ).metrics
    assert found["lambda_h"].value == pytest.approx(2 * x.square().mean().item())
    g = 2 * x * (x - y)
    assert found["lambda_c"].value == pytest.approx(g.var(correction=0).item())


def test_mini_batches_have_the_covariance_over_the_batch_size():
    """All batches of B out of N without replacement: C/B · (N−B)/(N−1), exactly."""
    n, size = 8, 3
    landscape, theta = planted(n, seed=4)
    batches = torch.stack(
        [landscape.x[list(batch)].mean(0) for batch in combinations(range(n), size)]
    )
    v = normal(100, seed=7)
    of_batches = (batches @ v).var(correction=0).item()
    C = landscape.covariance(theta)
    assert of_batches == pytest.approx((v @ C(v)).item() / size * (n - size) / (n - 1))


@pytest.mark.parametrize(("options", "message"), [({"k": 99}, "d=62"), ({"probes": 1}, "probes=1")])
def test_refusals(net, options, message):
    landscape, theta = net
    with pytest.raises(InputError, match=message.replace("62", str(len(theta)))):
        measure(landscape, theta, **options)


def test_too_few_samples_are_refused(net):
    """Each half needs a variance."""
    landscape, theta = net
    with pytest.raises(InputError, match="3 samples"):
        measure(landscape.subset(torch.arange(3)), theta)
