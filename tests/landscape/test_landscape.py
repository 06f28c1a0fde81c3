"""One function of θ: recalibrated, evaluated and restricted; what is no such function, refused."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from dense import matrix
from tiny import Merging, normal, rng, seeded
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten
from lsa.landscape.network import unwrapped
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def test_recalibration_takes_the_statistics_of_the_data_and_leaves_the_original():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    x, y = 3 + normal(50, 4), torch.randint(0, 2, (50,), generator=rng())
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
    g, H = landscape.gradient(2 * theta), matrix(landscape.hessian(2 * theta), theta)
    assert torch.allclose(part.gradient(at), g[kept])
    assert torch.allclose(matrix(part.hessian(at), at), H[kept][:, kept])
    assert landscape.dimension == len(theta)
    assert torch.equal(flatten(landscape.model), theta)


@pytest.mark.parametrize(
    ("names", "message"), [(["0.wait"], "named 0.wait;"), ([], "empty selection")]
)
def test_a_restriction_to_nothing_is_refused(mlp, names, message):
    with pytest.raises(InputError, match=message):
        mlp[0].restricted(mlp[1], names)


@pytest.mark.parametrize("copied", [True, False])
def test_a_network_is_evaluated_by_flags_alone(copied):
    model = seeded(lambda: nn.Sequential(Merging(4, 2), nn.Dropout(0.5)))
    x, y = normal(9, 4), torch.arange(9) % 2
    landscape = Landscape(model, x, y, copy=copied)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    exact = torch.autograd.grad(
        F.cross_entropy(model[0](x), y), [p for p in model.parameters()][1:]
    )
    found = landscape.gradient(landscape.theta)
    assert torch.allclose(found, torch.cat([g.flatten() for g in exact]))
    assert not model[0].merged and all(m.training for m in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_what_evaluation_does_to_the_flags_is_asked_once(monkeypatch):
    """With a copy of the network without numbers, which is not made at every pass."""
    model = seeded(lambda: nn.Sequential(Merging(4, 2), nn.Dropout(0.5)))
    landscape = Landscape(model, normal(9, 4), torch.arange(9) % 2, copy=False)
    first = landscape.loss(landscape.theta)
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("copied again"))
    assert landscape.loss(landscape.theta) == first


def test_copies_of_a_network_that_is_not_copied_itself_are_evaluated_too():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)))
    landscape = Landscape(model.train(), normal(9, 4), torch.arange(9) % 2, copy=False)
    theta = landscape.theta
    assert landscape.double().loss(theta) == pytest.approx(landscape.loss(theta))
    assert landscape.restricted(theta, ["0.bias"]).loss(theta[32:40]) == landscape.loss(theta)


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


def test_deepspeeds_engine_is_unwrapped_and_its_parted_parameters_are_refused():
    class DeepSpeedEngine(nn.Module):
        """Stands for DeepSpeed's, which holds the network as `module`."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    net = seeded(lambda: nn.Linear(3, 2))
    assert unwrapped(DeepSpeedEngine(net)) is net
    net.weight.ds_status = "NOT_AVAILABLE"
    with pytest.raises(InputError, match=r"'weight' is in parts over the processes .*fully_shard"):
        unwrapped(DeepSpeedEngine(net))


class Autocast(nn.Module):
    """Its outputs are in bfloat16, whatever θ is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.last(torch.tanh(self.first(x)))


def test_a_network_whose_outputs_are_in_half_precision_has_gradients_of_samples():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = Autocast(), torch.randn(12, 5), torch.arange(12) % 3
    landscape = Landscape(model, x, y)
    found = torch.cat([*landscape.sample_gradients(landscape.theta)])

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        a, b, c, d = theta.split([40, 8, 24, 3])
        hidden = F.linear(x, a.view(8, 5), b).tanh()
        return F.cross_entropy(F.linear(hidden, c.view(3, 8), d), y)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(landscape.theta, x, y)
    assert found.dtype == torch.float32
    assert (found - each).norm() < 2e-2 * each.norm()
