"""The spectrum of small networks against dense eigenvalues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, vmap

from lsa.figures.lanczos import draw
from lsa.landscape import Landscape, flatten
from lsa.probe import Result
from lsa.probes.lanczos import lanczos
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def net() -> tuple[Landscape, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(60, 6, generator=generator(1), dtype=torch.float64)
    y = torch.randint(0, 4, (60,), generator=generator(2))
    return Landscape(model, x, y, chunk=32), flatten(model)


def dense(matvec: Any, d: int) -> Tensor:
    return torch.stack([matvec(e) for e in torch.eye(d, dtype=torch.float64)], dim=1)


def measure(landscape: Landscape, theta: Tensor, seed: int = 0, **options: Any) -> Result:
    return lanczos(landscape, theta, generator(seed), lambda *_: None, **options)


def test_every_number_agrees_with_the_dense_hessian(net):
    landscape, theta = net
    H = dense(landscape.hessian(theta), len(theta))
    G = dense(landscape.gauss_newton(theta), len(theta))
    eigenvalues = torch.linalg.eigvalsh(H)
    found = measure(landscape, theta, k=4, k_min=2, tol=1e-8, density_probes=30)
    value = {name: metric.value for name, metric in found.metrics.items()}
    assert value["lambda_max"] == pytest.approx(eigenvalues[-1].item(), rel=1e-10)
    assert value["lambda_min"] == pytest.approx(eigenvalues[0].item(), rel=1e-10)
    expected = torch.cat([eigenvalues[-4:].flip(0), eigenvalues[:2].flip(0)])
    assert found.curves["eigenvalue"].y == pytest.approx(expected.numpy(), rel=1e-9)
    assert value["condition_number"] == pytest.approx(abs(eigenvalues[-1] / eigenvalues[0]).item())
    top, bottom = torch.linalg.eigvalsh(G)[-1].item(), torch.linalg.eigvalsh(H - G)[0].item()
    assert value["gauss_newton_lambda_max"] == pytest.approx(top, rel=1e-8)
    assert value["remainder_lambda_min"] == pytest.approx(bottom, rel=1e-8)
    assert value["lambda_min"] >= value["remainder_lambda_min"]
    for name, truth in (("trace", H.trace()), ("frobenius_squared", H.square().sum())):
        metric = found.metrics[name]
        assert metric.errors["probes"] > 0
        assert metric.value == pytest.approx(truth.item(), abs=4 * metric.errors["probes"])
    negative = (eigenvalues < 0).double().mean().item()
    assert value["negative_share"] == pytest.approx(negative, abs=0.1)
    assert found.converged and [note[:11] for note in found.notes] == ["no outliers"]


def test_errors_over_the_data_are_those_of_influences_by_finite_differences(net):
    """Each sample's weight raised a little, and the dense eigenvalues found anew."""
    landscape, theta = net
    found = measure(landscape, theta, density_probes=0, tol=1e-8)

    def outputs(t: Tensor, x: Tensor) -> Tensor:
        return landscape.outputs(t, x[None])

    def loss(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs(t, x), y[None])

    samples = theta, landscape.x, landscape.y
    H = vmap(hessian(loss), (None, 0, 0))(*samples)
    g = vmap(grad(loss), (None, 0, 0))(*samples)
    J = vmap(jacrev(outputs), (None, 0))(theta, landscape.x)[:, 0]  # of sample, class, parameter
    p = landscape.outputs(theta, landscape.x).softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # of the loss by the outputs
    G = J.mT @ curvature @ J

    def ends(A: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(A)[..., [0, -1]]

    for name, f, samples in (
        ("gauss_newton_lambda_max", lambda A: ends(A)[..., 1], G),
        ("remainder_lambda_min", lambda A: ends(A)[..., 0], H - G),
        ("gradient_norm", lambda v: v.norm(dim=-1), g),
    ):
        mean, step = samples.mean(0), 1e-6 * (samples - samples.mean(0))
        influences = (f(mean + step) - f(mean - step)) / 2e-6
        expected = (influences.std() / 60**0.5).item()
        assert found.metrics[name].errors["data"] == pytest.approx(expected, rel=1e-4), name


def test_the_error_over_the_data_is_the_spread_of_sample_curvatures(net):
    landscape, theta = net
    found = measure(landscape, theta, density_probes=0, split="no", tol=1e-8)
    v = torch.from_numpy(found.arrays["eigenvectors"][:, 0])
    curvatures = torch.stack(
        [v @ landscape.subset(torch.tensor([i])).hessian(theta)(v) for i in range(60)]
    )
    assert curvatures.mean().item() == pytest.approx(found.metrics["lambda_max"].value)
    expected = (curvatures.std() / 60**0.5).item()
    assert found.metrics["lambda_max"].errors["data"] == pytest.approx(expected)
    assert "density" not in found.curves and "trace" not in found.metrics


def test_the_density_integrates_to_one_on_a_grid_common_to_all_checkpoints(net):
    landscape, theta = net
    one, two = (measure(landscape, t, split="no").curves["density"] for t in (theta, 3 * theta))
    assert (one.x == two.x).all() and one.x_name == "relative_eigenvalue"
    for curve in (one, two):
        integral = torch.trapezoid(torch.from_numpy(curve.y), torch.from_numpy(curve.x)).item()
        assert integral == pytest.approx(1, abs=0.02)  # the kernels' tails leave the grid
        assert curve.error is not None and (curve.error >= 0).all()


@pytest.mark.parametrize("size", [10, 20, 30])
def test_subsets_have_sharper_and_more_negative_ends_on_average(net, size):
    """Jensen's inequality, exact for the parts of a partition: λ_max is convex in the matrix."""
    landscape, theta = net
    options: dict[str, Any] = {"density_probes": 0, "split": "no", "tol": 1e-6}
    whole = measure(landscape, theta, **options).metrics
    order = torch.randperm(60, generator=generator(3))
    parts = [measure(landscape.subset(i), theta, **options).metrics for i in order.split(size)]
    mean = {
        name: sum(part[name].value for part in parts) / len(parts)
        for name in ("lambda_max", "lambda_min")
    }
    assert mean["lambda_max"] > whole["lambda_max"].value
    assert mean["lambda_min"] < whole["lambda_min"].value


def test_eigenvectors_point_downhill_and_figures_are_drawn(net):
    landscape, theta = net
    found = measure(landscape, theta)
    gradient = landscape.gradient(theta).numpy()
    assert (gradient @ found.arrays["eigenvectors"] <= 0).all()
    assert len(draw(found, "title").axes) == 2
    assert len(draw(measure(landscape, theta, density_probes=0), "title").axes) == 1


def test_the_upper_end_alone_is_found_in_fewer_products(net):
    landscape, theta = net
    options = {"density_probes": 0, "split": "no", "tol": 1e-6}
    both, upper = (measure(landscape, theta, k_min=k_min, **options) for k_min in (1, 0))
    truth = torch.linalg.eigvalsh(dense(landscape.hessian(theta), len(theta)))[-1].item()
    assert upper.metrics["lambda_max"].value == pytest.approx(truth, rel=1e-9)
    assert upper.metrics["products"].value < both.metrics["products"].value
    missing = {"lambda_min", "lambda_min_residual"}
    missing |= {f"condition_number{end}" for end in ("", "_low", "_high")}
    assert both.metrics.keys() - upper.metrics.keys() == missing
    assert upper.converged and "lower end was left out" in upper.notes[0]
    assert list(upper.curves["eigenvalue"].x) == [1, 2, 3]
    assert len(draw(upper, "title").axes) == 1


def test_a_budget_that_is_too_small_is_said(net):
    landscape, theta = net
    found = measure(landscape, theta, max_products=5, density_probes=0, split="no")
    assert not found.converged
    assert found.metrics["products"].value == 5 and "max_products=5" in found.notes[0]


def test_a_part_of_the_split_that_has_not_converged_is_no_converged_result(net):
    landscape, theta = net
    budget = int(measure(landscape, theta, density_probes=0, split="no").metrics["products"].value)
    results = [
        measure(landscape, theta, density_probes=0, max_products=n) for n in range(5, budget + 1)
    ]
    assert all(result.converged == (not result.notes) for result in results)
    assert any("remainder" in note for result in results for note in result.notes)


def regression(n: int, d: int, rank: int, dtype: torch.dtype) -> tuple[Landscape, Tensor]:
    """½(xᵀw − y)² on data of a rank: H = XᵀX/n."""
    x = torch.randn(n, rank, generator=generator(4), dtype=torch.float64)
    x = (x @ torch.randn(rank, d, generator=generator(5), dtype=torch.float64)).to(dtype)
    model = nn.utils.skip_init(nn.Linear, d, 1, bias=False, dtype=dtype)
    landscape = Landscape(
        model, x, torch.ones(n, 1, dtype=dtype), lambda o, y: 0.5 * (o - y).square().mean()
    )
    return landscape, torch.ones(d, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_regression_on_data_of_rank_3(dtype):
    landscape, theta = regression(40, 50, 3, dtype)
    eigenvalues = torch.linalg.eigvalsh((landscape.x.T @ landscape.x).double() / 40)
    found = measure(landscape, theta)
    value = {name: metric.value for name, metric in found.metrics.items()}
    assert value["n_outliers"] == 3
    assert abs(value["bulk_edge"]) < 1e-5 * value["lambda_max"]
    assert value["negative_share"] == 0
    assert value["zero_share"] == pytest.approx(47 / 50, abs=0.1)
    assert found.curves["eigenvalue"].y[:3] == pytest.approx(
        eigenvalues[-3:].flip(0).numpy(), rel=1e-5
    )
    assert "condition_number" not in value
    assert any("no condition number" in note for note in found.notes)
    assert found.converged


def test_a_network_with_dead_units_has_no_more_negative_eigenvalues_than_it_has():
    """32 of 40 ReLUs never fire: their weights have eigenvalue 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4)).double()
    with torch.no_grad():
        model[0].bias[:32] = -100
    x = torch.randn(80, 8, generator=generator(1), dtype=torch.float64)
    y = torch.randint(0, 4, (80,), generator=generator(2))
    landscape, theta = Landscape(model, x, y), flatten(model)
    eigenvalues = torch.linalg.eigvalsh(dense(landscape.hessian(theta), len(theta)))
    small = 1e-12 * eigenvalues.abs().max()
    negative = (eigenvalues < -small).double().mean().item()
    found = measure(landscape, theta, split="no", bias="no").metrics
    assert found["negative_share"].value == pytest.approx(negative, abs=0.03)
    assert found["zero_share"].value == pytest.approx(
        (eigenvalues.abs() <= small).double().mean().item(), abs=0.15
    )


@pytest.mark.full
def test_the_bias_of_few_samples_is_what_the_halves_say(record_property):
    """Data sets of 60 out of 20,000 samples: the mean error of λ_max, and that after correction."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(20_000, 6, generator=generator(7), dtype=torch.float64)
    x *= torch.tensor([2.0, 1.5, 1, 1, 0.5, 0.5], dtype=torch.float64)
    everything = Landscape(model, x, torch.randint(0, 3, (20_000,), generator=generator(8)))
    theta = flatten(model)
    options: dict[str, Any] = {"k": 1, "k_min": 0, "density_probes": 0, "split": "no"}
    truth = measure(everything, theta, bias="no", **options).metrics["lambda_max"].value
    errors, biases, reported = [], [], []
    for seed in range(60):
        part = everything.subset(torch.randperm(20_000, generator=generator(seed))[:60])
        metrics = measure(part, theta, seed, **options).metrics
        errors.append(metrics["lambda_max"].value - truth)
        biases.append(metrics["lambda_max_bias"].value)
        reported.append(metrics["lambda_max"].errors["data"])
    error, bias = torch.tensor(errors), torch.tensor(biases)
    left = error - bias
    for name, off in (("as it is", error), ("less its bias", left)):
        share = (off.abs() <= 2 * torch.tensor(reported)).double().mean().item()
        label = f"lanczos: lambda_max of 60 samples, {name}"
        record_property("coverage", [label, "data", "95 %", share, 60])
    assert error.mean() > 0.5 * torch.tensor(reported).mean()  # worth telling
    assert abs(left.mean()) < 3 * left.std() / 60**0.5  # told without bias
    assert abs(left.mean()) < error.mean() / 2
    assert left.square().mean() < error.square().mean()


@pytest.mark.parametrize("seed", range(10))
def test_a_single_parameter(seed):
    landscape, theta = regression(30, 1, 1, torch.float64)
    found = measure(landscape, theta, seed, k=1, k_min=0, density_probes=2)
    assert found.metrics["lambda_max"].value == pytest.approx(
        landscape.x.square().mean().item(), rel=1e-10
    )


def test_above_which_no_eigenvalue_lies_is_said(net):
    landscape, theta = net
    metrics = measure(landscape, theta, split="no", bias="no", density_probes=0).metrics
    largest = torch.linalg.eigvalsh(dense(landscape.hessian(theta), len(theta)))[-1].item()
    assert largest * (1 - 1e-6) <= metrics["lambda_max_limit"].value < largest * 1.05


def test_more_eigenvalues_than_parameters_are_refused(net):
    with pytest.raises(InputError, match="d=92"):
        measure(*net, k=92)
