"""Derivatives against closed forms, dense autograd and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import matrix, sample_hessians
from tiny import normal, rng, seeded
from torch import nn

from lsa.landscape import Landscape, flatten
from lsa.landscape.derivatives import sample_gradients
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def test_linear_regression_has_the_hessian_of_its_closed_form():
    X, y = normal(31, 4), normal(31, 1, seed=2)
    model = seeded(lambda: nn.Linear(4, 1, bias=False))
    landscape = Landscape(model, X, y, F.mse_loss, chunk=8)
    theta = flatten(model)
    residual = X @ theta - y[:, 0]
    assert landscape.loss(theta) == pytest.approx(residual.square().mean().item(), rel=1e-12)
    assert torch.allclose(landscape.gradient(theta), 2 * X.T @ residual / 31)
    assert torch.allclose(matrix(landscape.hessian(theta), theta), 2 * X.T @ X / 31)
    assert torch.allclose(matrix(landscape.gauss_newton(theta), theta), 2 * X.T @ X / 31)


def test_softmax_regression_has_the_hessian_of_its_closed_form():
    X, y = normal(29, 4), torch.randint(0, 3, (29,), generator=rng())
    model = seeded(lambda: nn.Linear(4, 3, bias=False))
    landscape = Landscape(model, X, y, chunk=8)
    theta = flatten(model)
    p = (X @ theta.view(3, 4).T).softmax(1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H = torch.einsum("nab,ni,nj->aibj", blocks, X, X).reshape(12, 12) / 29
    assert torch.allclose(matrix(landscape.hessian(theta), theta), H)


def test_a_loss_linear_in_its_parameters_has_no_curvature():
    model = seeded(lambda: nn.Linear(3, 1))
    landscape = Landscape(model, normal(5, 3), normal(5, 1), lambda o, y: (o * y).mean())
    assert torch.equal(landscape.hessian(flatten(model))(normal(4)), torch.zeros(4).double())


def test_products_agree_with_dense_matrices(mlp):
    landscape, theta = mlp
    hessians = sample_hessians(landscape, theta)
    H = matrix(landscape.hessian(theta), theta)
    assert torch.allclose(H, hessians.mean(0), atol=1e-12)
    assert torch.allclose(landscape.hessian(theta)(normal(66, 3)), H @ normal(66, 3), atol=1e-12)
    G = matrix(landscape.gauss_newton(theta), theta)
    J = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda t, x=x: landscape.outputs(t, x[None]), theta)
            for x in landscape.x
        ]
    )[:, 0]
    p = landscape.outputs(theta, landscape.x).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert torch.allclose(G, torch.einsum("nad,nab,nbe->de", J, inner, J) / 23, atol=1e-12)
    assert torch.linalg.eigvalsh((G + G.T) / 2)[0] > -1e-12  # positive: H − G holds the rest


def test_gauss_newton_and_residual_curvature_add_up_to_the_hessian(mlp):
    landscape, theta = mlp
    x, y = landscape.x, landscape.y
    slopes = landscape.outputs(theta, x).softmax(1) - F.one_hot(y, 3)  # ∂ℓ/∂f of cross-entropy
    R = torch.autograd.functional.hessian(
        lambda t: (slopes * landscape.outputs(t, x)).sum() / 23, theta
    )
    H = matrix(landscape.hessian(theta), theta)
    assert torch.allclose(matrix(landscape.gauss_newton(theta), theta) + R, H, atol=1e-12)
    assert torch.allclose(H, H.T, atol=1e-12)


class Curve(nn.Module):
    """ℓᵢ(w) = yᵢ exp(xᵢ·w) by a parameter of no layer, so that ∇ℓᵢ = ℓᵢ xᵢ."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(4))

    def forward(self, x):
        return (x @ self.w).exp()


@pytest.mark.parametrize("loss", [lambda o, y: (o * y).mean(), lambda o, y: o.dot(y) / len(y)])
def test_gradients_of_samples_without_a_layer_take_one_pass(loss, monkeypatch):
    monkeypatch.delattr(sample_gradients, "rows_one_by_one")
    x, y = normal(9, 4), torch.rand(9, generator=rng(1), dtype=torch.float64)
    landscape = Landscape(Curve(), x, y, loss)
    w = landscape.theta
    wanted = (y * (x @ w).exp())[:, None] * x
    assert torch.allclose(torch.cat(list(landscape.sample_gradients(w))), wanted, atol=1e-12)


def test_covariance_agrees_with_sample_gradients(mlp):
    landscape, theta = mlp
    g = torch.cat(list(landscape.sample_gradients(theta)))
    centred = g - g.mean(0)
    product, mean = landscape.covariance_and_mean(theta)
    C = matrix(product, theta)
    assert torch.equal(C, matrix(landscape.covariance(theta), theta))
    assert torch.allclose(mean, landscape.gradient(theta), atol=1e-12)
    assert torch.allclose(mean, g.mean(0), atol=1e-12)
    assert torch.allclose(C, centred.T @ centred / 23, atol=1e-12)
    second = matrix(landscape.covariance(theta, centred=False), theta)
    assert torch.allclose(second, g.T @ g / 23, atol=1e-12)
    identity = g.square().sum(1).mean() - landscape.gradient(theta).square().sum()
    assert C.trace().item() == pytest.approx(identity.item(), rel=1e-10)


def test_one_pass_gives_losses_errors_and_slopes(mlp):
    landscape, theta = mlp
    u = torch.randn(len(theta), generator=torch.Generator().manual_seed(3)).to(theta)
    losses, wrong, slopes = landscape.per_sample_and_slopes(theta, u)
    expected, expected_wrong = landscape.per_sample(theta)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(wrong, expected_wrong)
    rows = torch.func.jacrev(landscape.data.few(landscape.network, len(landscape.x)).losses)(theta)
    torch.testing.assert_close(slopes, rows @ u)


def test_losses_of_all_samples_at_once_are_those_of_each_alone(mlp):
    landscape, theta = mlp
    alone = Landscape(landscape.model, landscape.x, landscape.y, lambda o, y: F.cross_entropy(o, y))
    u = normal(len(theta))
    for measure in ("losses", "slopes", "curvatures", "gauss_newton_curvatures"):
        along = () if measure == "losses" else (u,)
        one_by_one = getattr(alone, measure)(theta, *along)
        torch.testing.assert_close(getattr(landscape, measure)(theta, *along), one_by_one)
    left_out = torch.where(torch.arange(23) == 3, -100, landscape.y)
    part = landscape.with_data(landscape.x, left_out)
    losses = part.losses(theta)
    expected = landscape.losses(theta) * 23 / 22
    expected[3] = 0
    torch.testing.assert_close(losses, expected)
    assert part.loss(theta) == pytest.approx(losses.mean().item(), rel=1e-12)
    with pytest.raises(InputError, match="no mean over samples"):
        alone.with_data(landscape.x, left_out).losses(theta)


def test_sample_curvatures_agree_with_dense_sample_hessians(mlp):
    landscape, theta = mlp
    u = normal(66)
    expected = torch.einsum("i,nij,j->n", u, sample_hessians(landscape, theta), u)
    assert torch.allclose(landscape.curvatures(theta, u), expected, atol=1e-10)


def test_derivatives_agree_with_finite_differences_to_second_order(mlp):
    landscape, theta = mlp
    v = normal(66)
    v /= v.norm()

    def errors(h: float) -> tuple[float, float]:
        slope = (landscape.loss(theta + h * v) - landscape.loss(theta - h * v)) / (2 * h)
        g = (landscape.gradient(theta + h * v) - landscape.gradient(theta - h * v)) / (2 * h)
        first = abs(slope - float(landscape.gradient(theta) @ v))
        return first, float((g - landscape.hessian(theta)(v)).norm())

    for coarse, fine in zip(errors(1e-2), errors(1e-3), strict=True):
        assert 80 < coarse / fine < 120  # central differences: error ∝ h²


def test_all_products_work_for_tanh_with_squared_error():
    """Forward-over-reverse differentiation fails on this pair in torch 2.14."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    landscape = Landscape(model, normal(9, 3), normal(9, 2, seed=2), F.mse_loss, chunk=4)
    theta, v = flatten(model), normal(26)
    H = sample_hessians(landscape, theta).mean(0)
    assert torch.allclose(landscape.hessian(theta)(v), H @ v, atol=1e-12)
    assert landscape.curvatures(theta, v).mean().item() == pytest.approx(float(v @ H @ v))
    assert landscape.covariance(theta)(v).isfinite().all()
    assert float(v @ landscape.gauss_newton(theta)(v)) >= 0
