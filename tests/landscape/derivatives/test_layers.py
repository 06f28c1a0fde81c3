"""Derivatives of networks whose layers are fused, fixed, tied or normalised."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dense import matrix, sample_hessians
from tiny import normal, rng, seeded
from torch import nn

from lsa.landscape import Landscape, flatten

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    "attention",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
        SelfAttention,
    ],
)
def test_attention_has_all_products(attention):
    """In evaluation mode torch takes fused kernels, which lack the derivatives."""
    model = seeded(lambda: nn.Sequential(attention(), nn.Flatten(), nn.Linear(24, 2)))
    x, y = normal(6, 3, 8), torch.randint(0, 2, (6,), generator=rng())
    landscape, theta = Landscape(model, x, y, chunk=4), flatten(model)
    v, h = normal(len(theta)), 1e-5
    Hv = landscape.hessian(theta)(v)
    moved = landscape.gradient(theta + h * v) - landscape.gradient(theta - h * v)
    assert torch.allclose(Hv, moved / (2 * h), rtol=1e-4, atol=1e-6)
    assert landscape.curvatures(theta, v).mean().item() == pytest.approx(float(v @ Hv), rel=1e-9)
    g = torch.cat(list(landscape.sample_gradients(theta))) - landscape.gradient(theta)
    assert torch.allclose(landscape.covariance(theta)(v), g.T @ (g @ v) / 6, atol=1e-12)
    J = torch.autograd.functional.jacobian(lambda t: landscape.outputs(t, x), theta)
    p = landscape.outputs(theta, x).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    G = torch.einsum("nad,nab,nbe->de", J, inner, J) / 6
    assert torch.allclose(landscape.gauss_newton(theta)(v), G @ v, atol=1e-10)
    assert torch.backends.mha.get_fastpath_enabled()  # the caller's setting stays


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6), nn.GELU()])
def test_curvatures_of_normalised_networks(norm):
    """Forward mode applied twice is silently wrong for layer norm (seen in torch 2.14)."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, 3)))
    y = torch.randint(0, 3, (9,), generator=rng())
    landscape, theta = Landscape(model, normal(9, 4), y, chunk=4), flatten(model)
    u, h = normal(len(theta)), 1e-4
    u /= u.norm()
    expected = torch.einsum("i,nij,j->n", u, sample_hessians(landscape, theta), u)
    found = landscape.curvatures(theta, u)
    assert torch.allclose(found, expected, atol=1e-10)
    around = [landscape.losses(theta + step * u) for step in (-h, 0, h)]
    # Rounding of the second difference: about 4 ulp of a loss of order 1, over h²; error ∝ h².
    assert torch.allclose(found, (around[0] - 2 * around[1] + around[2]) / h**2, atol=1e-5)


def test_convolutions_in_single_precision_agree_with_double():
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
        )
    )  # fmt: skip
    x, y = normal(10, 2, 8, 8), torch.randint(0, 3, (10,), generator=rng())
    double, theta = Landscape(model, x, y, chunk=4), flatten(model)
    single = Landscape(copy.deepcopy(model).float(), x.float(), y, chunk=4)
    v = normal(len(theta))
    for name in ("hessian", "gauss_newton", "covariance"):
        exact = getattr(double, name)(theta)(v)
        found = getattr(single, name)(theta.float())(v.float())
        assert found.dtype == torch.float32
        assert (found - exact).norm() <= 1e-5 * exact.norm(), name
    # float64 asks the same of the memory layout and of the derivative's other route.
    rows = Landscape(model, x, y, chunk=4, layout="contiguous")
    assert double.x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(rows.hessian(theta)(v), double.hessian(theta)(v), atol=1e-12)
    total = float(v @ double.hessian(theta)(v))
    assert double.curvatures(theta, v).mean().item() == pytest.approx(total, rel=1e-10)


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model = seeded(Tied)
    x, y = normal(7, 4), torch.randint(0, 4, (7,), generator=rng())
    landscape, theta = Landscape(model, x, y, chunk=3), flatten(model)
    assert landscape.dimension == len(theta) == 24

    def loss(t):
        W, a, b = t[:16].view(4, 4), t[16:20], t[20:]
        return F.cross_entropy(torch.tanh(x @ W.T + a) @ W.T + b, y)

    H = torch.autograd.functional.hessian(loss, theta)
    assert torch.allclose(matrix(landscape.hessian(theta), theta), H, atol=1e-12)


def test_batch_norm_and_dropout_make_one_fixed_function():
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(27, 2),
        )
    )  # fmt: skip
    x, y = normal(11, 1, 8, 8), torch.randint(0, 2, (11,), generator=rng())
    model.train()
    before = copy.deepcopy(model.state_dict())
    landscape, theta = Landscape(model, x, y, chunk=4), flatten(model)
    v = normal(len(theta))
    assert torch.equal(landscape.hessian(theta)(v), landscape.hessian(theta)(v))
    assert landscape.loss(theta) == Landscape(model, x, y, chunk=4).loss(theta)
    assert model.training and all(torch.equal(before[k], s) for k, s in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
