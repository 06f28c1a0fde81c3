"""Derivatives of a landscape against closed forms, dense autograd and finite differences."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lsa.landscape import Landscape, flatten
from lsa.landscape.derivatives import budget
from lsa.runtime.errors import InputError
from lsa.training import models

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def seeded(make, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


@pytest.fixture
def mlp() -> tuple[Landscape, torch.Tensor]:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))
    y = torch.randint(0, 3, (23,), generator=generator())
    return Landscape(model, normal(23, 5), y, chunk=7), flatten(model)


def dense(matvec, theta: torch.Tensor) -> torch.Tensor:
    return torch.stack([matvec(e) for e in torch.eye(len(theta), dtype=theta.dtype)], dim=1)


def sample_hessians(landscape: Landscape, theta: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda t, x=x, y=y: landscape.loss_function(landscape.outputs(t, x[None]), y[None]),
                theta,
            )
            for x, y in zip(landscape.x, landscape.y, strict=True)
        ]
    )


def test_linear_regression_has_the_hessian_of_its_closed_form():
    X, y = normal(31, 4), normal(31, 1, seed=2)
    model = seeded(lambda: nn.Linear(4, 1, bias=False))
    landscape = Landscape(model, X, y, F.mse_loss, chunk=8)
    theta = flatten(model)
    residual = X @ theta - y[:, 0]
    assert landscape.loss(theta) == pytest.approx(residual.square().mean().item(), rel=1e-12)
    assert torch.allclose(landscape.gradient(theta), 2 * X.T @ residual / 31)
    assert torch.allclose(dense(landscape.hessian(theta), theta), 2 * X.T @ X / 31)
    assert torch.allclose(dense(landscape.gauss_newton(theta), theta), 2 * X.T @ X / 31)


def test_softmax_regression_has_the_hessian_of_its_closed_form():
    X, y = normal(29, 4), torch.randint(0, 3, (29,), generator=generator())
    model = seeded(lambda: nn.Linear(4, 3, bias=False))
    landscape = Landscape(model, X, y, chunk=8)
    theta = flatten(model)
    p = (X @ theta.view(3, 4).T).softmax(1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H = torch.einsum("nab,ni,nj->aibj", blocks, X, X).reshape(12, 12) / 29
    assert torch.allclose(dense(landscape.hessian(theta), theta), H)


def test_chunks_of_uneven_size_are_weighted_exactly():
    """A split of 200 + 56 whose products an unweighted average gets wrong by more than half."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))
    x = torch.cat([normal(200, 5), 5 + 3 * normal(56, 5, seed=3)])
    y = torch.randint(0, 3, (256,), generator=generator())
    theta, v = flatten(model), normal(66)
    whole, uneven = Landscape(model, x, y, chunk=256), Landscape(model, x, y, chunk=200)
    assert uneven.loss(theta) == pytest.approx(whole.loss(theta), rel=1e-12)
    parts = [whole.subset(indices) for indices in torch.arange(256).split(200)]
    for name in ("hessian", "gauss_newton", "covariance"):
        a, b = getattr(whole, name)(theta)(v), getattr(uneven, name)(theta)(v)
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13), name
        unweighted = sum(getattr(part, name)(theta)(v) for part in parts) / 2
        assert (unweighted - a).norm() > 0.5 * a.norm(), name  # the mistake would show


def test_products_agree_with_dense_matrices(mlp):
    landscape, theta = mlp
    hessians = sample_hessians(landscape, theta)
    H = dense(landscape.hessian(theta), theta)
    assert torch.allclose(H, hessians.mean(0), atol=1e-12)
    assert torch.allclose(landscape.hessian(theta)(normal(66, 3)), H @ normal(66, 3), atol=1e-12)
    G = dense(landscape.gauss_newton(theta), theta)
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


def test_covariance_agrees_with_sample_gradients(mlp):
    landscape, theta = mlp
    g = torch.cat(list(landscape.sample_gradients(theta)))
    centred = g - g.mean(0)
    product, mean = landscape.covariance_and_mean(theta)
    C = dense(product, theta)
    assert torch.equal(C, dense(landscape.covariance(theta), theta))
    assert torch.allclose(mean, landscape.gradient(theta), atol=1e-12)
    assert torch.allclose(mean, g.mean(0), atol=1e-12)
    assert torch.allclose(C, centred.T @ centred / 23, atol=1e-12)
    second = dense(landscape.covariance(theta, centred=False), theta)
    assert torch.allclose(second, g.T @ g / 23, atol=1e-12)
    identity = g.square().sum(1).mean() - landscape.gradient(theta).square().sum()
    assert C.trace().item() == pytest.approx(identity.item(), rel=1e-10)


@pytest.mark.parametrize("known", [True, False])
def test_one_pass_gives_losses_errors_and_slopes(mlp, monkeypatch, known):
    landscape, theta = mlp
    assert landscape._known_by_layers(theta)
    monkeypatch.setattr(landscape, "_known_by_layers", lambda theta: known)
    u = torch.randn(len(theta), generator=torch.Generator().manual_seed(3)).to(theta)
    losses, wrong, slopes = landscape.per_sample_along(theta, u)
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


def test_batch_norm_and_dropout_make_one_fixed_function():
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(27, 2),
        )
    )  # fmt: skip
    x, y = normal(11, 1, 8, 8), torch.randint(0, 2, (11,), generator=generator())
    model.train()
    before = copy.deepcopy(model.state_dict())
    landscape, theta = Landscape(model, x, y, chunk=4), flatten(model)
    v = normal(len(theta))
    assert torch.equal(landscape.hessian(theta)(v), landscape.hessian(theta)(v))
    assert landscape.loss(theta) == Landscape(model, x, y, chunk=4).loss(theta)
    assert model.training and all(torch.equal(before[k], s) for k, s in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_recalibration_takes_the_statistics_of_the_data_and_leaves_the_original():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    x, y = 3 + normal(50, 4), torch.randint(0, 2, (50,), generator=generator())
    landscape, theta = Landscape(model, x, y), 2 * flatten(model)
    again = landscape.recalibrated(theta)
    hidden = x @ (2 * model[0].weight.detach()).T + 2 * model[0].bias.detach()
    assert torch.allclose(again.model[1].running_mean, hidden.mean(0))
    assert torch.allclose(again.model[1].running_var, hidden.var(0))
    assert torch.equal(landscape.model[1].running_mean, torch.zeros(3).double())
    plain = Landscape(seeded(lambda: nn.Linear(4, 2)), x, y)
    assert plain.recalibrated(normal(10)) is plain


def test_evaluation_has_the_standard_errors_of_its_means(mlp):
    landscape, theta = mlp
    logits = landscape.outputs(theta, landscape.x)
    losses = F.cross_entropy(logits, landscape.y, reduction="none")
    wrong = (logits.argmax(1) != landscape.y).double()
    found = landscape.evaluate(theta)
    assert found.loss == pytest.approx(losses.mean().item())
    assert found.loss_error == pytest.approx(losses.std().item() / 23**0.5)
    assert found.error == pytest.approx(wrong.mean().item())
    assert found.error_error == pytest.approx(wrong.std().item() / 23**0.5)
    assert torch.allclose(landscape.losses(theta), losses)


def test_a_loss_linear_in_its_parameters_has_no_curvature():
    model = seeded(lambda: nn.Linear(3, 1))
    landscape = Landscape(model, normal(5, 3), normal(5, 1), lambda o, y: (o * y).mean())
    assert torch.equal(landscape.hessian(flatten(model))(normal(4)), torch.zeros(4).double())


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
    x, y = normal(6, 3, 8), torch.randint(0, 2, (6,), generator=generator())
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
    y = torch.randint(0, 3, (9,), generator=generator())
    landscape, theta = Landscape(model, normal(9, 4), y, chunk=4), flatten(model)
    u, h = normal(len(theta)), 1e-4
    u /= u.norm()
    expected = torch.einsum("i,nij,j->n", u, sample_hessians(landscape, theta), u)
    found = landscape.curvatures(theta, u)
    assert torch.allclose(found, expected, atol=1e-10)
    around = [landscape.losses(theta + step * u) for step in (-h, 0, h)]
    # Rounding of the second difference: about 4 ulp of a loss of order 1, over h²; error ∝ h².
    assert torch.allclose(found, (around[0] - 2 * around[1] + around[2]) / h**2, atol=1e-5)


def test_one_chunk_and_uneven_chunks_agree(mlp):
    uneven, theta = mlp
    whole = Landscape(uneven.model, uneven.x, uneven.y, chunk=23)
    v = normal(66)
    assert uneven.loss(theta) == pytest.approx(whole.loss(theta), rel=1e-12)
    assert torch.allclose(uneven.gradient(theta), whole.gradient(theta), rtol=1e-12, atol=1e-14)
    assert torch.allclose(uneven.curvatures(theta, v), whole.curvatures(theta, v), rtol=1e-12)
    for name in ("hessian", "gauss_newton", "covariance"):
        a, b = getattr(whole, name)(theta)(v), getattr(uneven, name)(theta)(v)
        assert (a - b).norm() <= 1e-12 * a.norm(), name


def test_gauss_newton_and_residual_curvature_add_up_to_the_hessian(mlp):
    landscape, theta = mlp
    x, y = landscape.x, landscape.y
    slopes = landscape.outputs(theta, x).softmax(1) - F.one_hot(y, 3)  # ∂ℓ/∂f of cross-entropy
    R = torch.autograd.functional.hessian(
        lambda t: (slopes * landscape.outputs(t, x)).sum() / 23, theta
    )
    H = dense(landscape.hessian(theta), theta)
    assert torch.allclose(dense(landscape.gauss_newton(theta), theta) + R, H, atol=1e-12)
    assert torch.allclose(H, H.T, atol=1e-12)


def test_convolutions_in_single_precision_agree_with_double():
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
        )
    )  # fmt: skip
    x, y = normal(10, 2, 8, 8), torch.randint(0, 3, (10,), generator=generator())
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
    x, y = normal(7, 4), torch.randint(0, 4, (7,), generator=generator())
    landscape, theta = Landscape(model, x, y, chunk=3), flatten(model)
    assert landscape.dimension == len(theta) == 24

    def loss(t):
        W, a, b = t[:16].view(4, 4), t[16:20], t[20:]
        return F.cross_entropy(torch.tanh(x @ W.T + a) @ W.T + b, y)

    H = torch.autograd.functional.hessian(loss, theta)
    assert torch.allclose(dense(landscape.hessian(theta), theta), H, atol=1e-12)


def test_the_callers_gradient_mode_and_graph_do_not_matter(mlp):
    landscape, theta = mlp
    attached, v = theta.clone().requires_grad_(), normal(66)
    for name in ("hessian", "gauss_newton", "covariance"):
        expected = getattr(landscape, name)(theta)(v)
        with torch.no_grad():
            assert torch.equal(getattr(landscape, name)(theta)(v), expected), name
        assert not getattr(landscape, name)(attached)(v).requires_grad
    with torch.no_grad():
        assert landscape.gradient(theta).norm() > 0
        assert landscape.curvatures(theta, v).isfinite().all()
    assert not landscape.curvatures(attached, v).requires_grad
    assert not next(landscape.sample_gradients(attached)).requires_grad
    assert attached.grad is None


def test_recalibration_weights_the_samples_evenly():
    """16 513 samples in chunks of ceil(N/128) would leave a last chunk of one sample."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    x = normal(16513, 4)
    x[-3:] += 1000
    landscape = Landscape(model, x, torch.zeros(16513, dtype=torch.long))
    mean = landscape.recalibrated(flatten(model)).model[1].running_mean
    with torch.no_grad():
        exact = model[0](x).mean(0)
    assert (mean - exact).norm() <= exact.norm() / 128  # chunks of 129 or 128 samples


def test_batch_norm_without_statistics_is_refused():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), norm))
    with pytest.raises(InputError, match="batch norm '1' keeps no running statistics"):
        Landscape(model, normal(5, 3), torch.zeros(5, dtype=torch.long))


def test_frozen_parameters_are_not_in_theta():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    model[0].requires_grad_(False)
    landscape = Landscape(model, normal(5, 3), torch.tensor([0, 1, 0, 1, 1]))
    assert landscape.dimension == len(flatten(model)) == 10
    assert landscape.gradient(flatten(model)).shape == (10,)


def test_subsets_and_bad_input(mlp):
    landscape, theta = mlp
    part = landscape.subset(torch.tensor([3, 1]))
    assert part.n_samples == 2
    assert part.loss(theta) == pytest.approx(landscape.losses(theta)[[3, 1]].mean().item())
    with pytest.raises(InputError, match="3 inputs and 2 targets"):
        landscape.with_data(normal(3, 5), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="chunk=0"):
        Landscape(landscape.model, landscape.x, landscape.y, chunk=0)
    with pytest.raises(InputError, match="0 inputs"):
        landscape.subset(torch.tensor([], dtype=torch.long))
    other = landscape.with_data(landscape.x[:4], landscape.y[:4])
    assert other.n_samples == 4 and landscape.n_samples == 23
    assert other.loss(theta) == pytest.approx(landscape.losses(theta)[:4].mean().item())


def test_restricted_to_some_parameters_it_has_their_blocks_of_gradient_and_hessian(mlp):
    landscape, theta = mlp
    names = ["2.weight", "0.bias"]  # in the network's order, whatever the order asked for
    part = landscape.restricted(2 * theta, names)
    at = flatten(part.model)
    whole = landscape.unflatten(2 * theta)
    assert torch.equal(at, torch.cat([whole["0.bias"], whole["2.weight"].flatten()]))
    assert part.loss(at) == pytest.approx(landscape.loss(2 * theta))
    kept = torch.cat(
        [torch.full((p.numel(),), name in names) for name, p in landscape.unflatten(theta).items()]
    )
    g, H = landscape.gradient(2 * theta), dense(landscape.hessian(2 * theta), theta)
    assert torch.allclose(part.gradient(at), g[kept])
    assert torch.allclose(dense(part.hessian(at), at), H[kept][:, kept])
    assert landscape.dimension == len(theta)
    assert torch.equal(flatten(landscape.model), theta)


@pytest.mark.parametrize(("names", "message"), [(["0.wait"], "named 0.wait;"), ([], "at all")])
def test_a_restriction_to_nothing_is_refused(mlp, names, message):
    with pytest.raises(InputError, match=message):
        mlp[0].restricted(mlp[1], names)


def test_a_setting_fixes_chunk_and_memory_for_all_but_who_says_otherwise(mlp, monkeypatch):
    landscape, theta = mlp
    model, x, y, v = landscape.model, landscape.x, landscape.y, normal(len(theta))
    expected = landscape.hessian(theta)(v)
    for chunk, memory in ((5, 0), (5, 10**9), (23, 0)):
        monkeypatch.setattr(budget, "_configured", budget.Settings(chunk, memory))
        fixed = Landscape(model, x, y)
        for one in (fixed, fixed.subset(torch.arange(9))):
            assert (one.chunk, one.graph_memory) == (chunk, memory)
        assert torch.allclose(fixed.hessian(theta)(v), expected, rtol=1e-12)
    own = Landscape(model, x, y, chunk=7, memory=8)
    assert (own.chunk, own.graph_memory) == (7, 8)


@pytest.mark.parametrize("chunk", [3, 24])
@pytest.mark.parametrize("memory", [0, 10**9])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_every_choice_of_the_engine_gives_the_same_derivatives(chunk, memory, layout, monkeypatch):
    """In float32; the reference has the usual choices, in float64."""
    model = models.build("simple_cnn", input_shape=(3, 8, 8), classes=10, seed=0, width=8)
    x, y = normal(24, 3, 8, 8).float(), torch.arange(24) % 10
    usual = Landscape(model, x, y)
    monkeypatch.setattr(budget, "_configured", budget.Settings(layout=layout))
    forced = Landscape(model, x, y, chunk=chunk, memory=memory)
    assert forced.layout == layout
    for one in (forced, forced.subset(torch.arange(12)), forced.with_model(model)):
        assert (one.chunk, one.graph_memory) == (chunk, memory)
        assert one.x.is_contiguous(memory_format=budget.LAYOUTS[layout])
    theta = flatten(model)
    exact, v = usual.double(), normal(len(theta))
    assert relative(forced.gradient(theta), exact.gradient(theta.double())) < 1e-5
    for name in ("hessian", "gauss_newton", "covariance"):
        found = getattr(forced, name)(theta)(v.float())
        assert relative(found, getattr(exact, name)(theta.double())(v.double())) < 1e-5
    u = v.float() / v.float().norm()
    assert (
        relative(forced.curvatures(theta, u), exact.curvatures(theta.double(), u.double())) < 1e-5
    )


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_a_layout_that_there_is_not_is_refused(mlp, monkeypatch):
    landscape, _ = mlp
    with pytest.raises(InputError, match="layout='rows'; choose channels_last or contiguous"):
        Landscape(landscape.model, landscape.x, landscape.y, layout="rows")
    monkeypatch.setenv("LSA_LAYOUT", "rows")
    with pytest.raises(InputError, match="LSA_LAYOUT='rows' is none of channels_last, contiguous;"):
        budget.from_environment()


def test_modules_that_nest_deeper_than_the_stack_are_refused_in_one_line():
    flat = seeded(lambda: nn.Linear(2, 2))
    deep: nn.Module = flat
    for _ in range(250):
        deep = nn.Sequential(deep)
    data = normal(6, 2), torch.tensor([0, 1] * 3)
    with pytest.raises(InputError, match="nest deeper than Python's stack reaches") as caught:
        Landscape(deep, *data)
    assert "\n" not in str(caught.value)
    limit, products = sys.getrecursionlimit(), []
    sys.setrecursionlimit(10_000)  # as the line says
    try:
        for model in (flat, deep):
            landscape, theta = Landscape(model, *data), flatten(model)
            products.append(landscape.hessian(theta)(torch.ones_like(theta)))
    finally:
        sys.setrecursionlimit(limit)
    assert torch.equal(*products)
