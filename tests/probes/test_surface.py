"""The surface against quadratics in closed form, the checkpoints' own losses and rescaling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lsa.figures import interactive
from lsa.figures.surface import draw
from lsa.landscape import Landscape, flatten
from lsa.probe import Result, find
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

SCALES = [0.5, 1.0, 1.5]  # of the samples' losses: of mean 1 and standard deviation 0.5


class Quadratic(nn.Module):
    """ℓᵢ(W) = xᵢ · ½ wᵀHw, W of two filters with three weights."""

    def __init__(self, H: Tensor) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.4, 1.2]]).double())
        self.H = H

    def forward(self, x: Tensor) -> Tensor:
        w = self.W.reshape(-1)
        return (w @ self.H @ w / 2) * x


def hessian() -> Tensor:
    rng = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64)).Q
    return Q @ torch.diag(torch.tensor([8.0, 3, 1, 0.5, 0.1, -2]).double()) @ Q.T


def quadratic() -> tuple[Landscape, Tensor]:
    model = Quadratic(hessian())
    x = torch.tensor(SCALES, dtype=torch.float64).unsqueeze(1)
    return Landscape(model, x, torch.zeros(3), lambda o, y: o.mean()), flatten(model)


def linear(inputs: int, outputs: int) -> nn.Module:
    """A layer whose weights are drawn later, not from the global random state."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs)


def classifier(*layers: nn.Module, seed: int = 0) -> Landscape:
    """A network with random weights, in float64, on random data of three classes."""
    rng = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.5)
    x = torch.randn(40, 4, generator=rng, dtype=torch.float64)
    return Landscape(model, x, torch.randint(3, (40,), generator=rng))


def relu_network() -> Landscape:
    return classifier(linear(4, 6), nn.ReLU(), linear(6, 3))


def moved(landscape: Landscape, n: int) -> list[Tensor]:
    """Points (d,) about the network's weights."""
    rng = torch.Generator().manual_seed(9)
    theta = flatten(landscape.model)
    return [theta + 0.3 * torch.randn(len(theta), generator=rng) for _ in range(n)]


def measure(landscape: Landscape, theta: Tensor, **given: Any) -> Result:
    return find("surface")(landscape=landscape, theta=theta, **{"points": 7, **given})


def arrays(result: Result) -> dict[str, np.ndarray]:
    return {k.removeprefix("surface."): v for k, v in result.arrays.items()}


def values(result: Result) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


# --- the planes ----------------------------------------------------------------------------------


def test_a_random_plane_of_a_quadratic_is_known_at_every_point():
    landscape, theta = quadratic()
    found = measure(landscape, theta, extent=0.8)
    got, v, H = arrays(found), values(found), hessian()
    U = torch.from_numpy(got["directions"])
    norms = theta.view(2, 3).norm(dim=1)
    for k in range(2):
        torch.testing.assert_close(U[:, k].view(2, 3).norm(dim=1), norms)
    expected = np.empty((7, 7))
    for j, y in enumerate(got["y"]):
        for i, x in enumerate(got["x"]):
            w = theta + U @ torch.tensor([x, y])
            expected[j, i] = w @ H @ w / 2
    np.testing.assert_allclose(got["loss"], expected, rtol=1e-12)
    # the samples differ in scale alone, so every error is that of their mean scale
    relative = 0.5 / 3**0.5
    np.testing.assert_allclose(got["loss_error"], relative * np.abs(expected), rtol=1e-12)
    rises = np.abs(expected - expected[3, 3])
    np.testing.assert_allclose(got["rise_error"], relative * rises, rtol=1e-9, atol=1e-12)
    assert got["x"] == pytest.approx(np.linspace(-0.8, 0.8, 7))
    for k, axis in enumerate("xy"):
        curvature = found.metrics[f"curvature_{axis}"]
        assert curvature.value == pytest.approx(float(U[:, k] @ H @ U[:, k]))
        assert curvature.errors["data"] == pytest.approx(relative * abs(curvature.value))
        assert v[f"length_{axis}"] == pytest.approx(float(theta.norm()))
    assert v["cosine"] == pytest.approx(0, abs=1e-12)
    assert v["lowest_rise"] == pytest.approx((expected - expected[3, 3]).min())
    assert v["highest_rise"] == pytest.approx((expected - expected[3, 3]).max())
    assert found.curves["rise_along_random_x"].y == pytest.approx(expected[3] - expected[3, 3])
    assert found.curves["rise_along_random_y"].y == pytest.approx(expected[:, 3] - expected[3, 3])


def test_the_hessian_plane_of_a_quadratic_is_its_saddle():
    landscape, theta = quadratic()
    found = measure(landscape, theta * 0, plane="hessian", extent=0.5, tol=1e-8)
    got, v = arrays(found), values(found)
    x, y = np.meshgrid(got["x"], got["y"])
    np.testing.assert_allclose(got["loss"], 4 * x**2 - y**2, atol=1e-9)
    assert got["x"][-1] == pytest.approx(0.5 * (2 / 8) ** 0.5)
    assert (v["lambda_max"], v["lambda_min"]) == pytest.approx((8, -2))
    assert v["highest_rise"] == pytest.approx(0.25)  # extent²
    assert found.metrics["lambda_max"].errors["data"] == pytest.approx(8 * 0.5 / 3**0.5)


def test_second_differences_of_a_networks_hessian_plane_are_its_eigenvalues():
    landscape = classifier(linear(4, 5), nn.Tanh(), linear(5, 3))
    theta = flatten(landscape.model)
    found = measure(landscape, theta, plane="hessian", extent=1e-2, tol=1e-8)
    got, v = arrays(found), values(found)
    dense = torch.linalg.eigvalsh(landscape.hessian(theta)(torch.eye(len(theta)).double()))
    h = got["x"][4] - got["x"][3]
    loss = got["loss"]
    for line, axis, exact in ((loss[3], "max", dense[-1]), (loss[:, 3], "min", dense[0])):
        second = (line[4] + line[2] - 2 * line[3]) / h**2
        assert second == pytest.approx(float(exact), rel=1e-3)
        assert v[f"lambda_{axis}"] == pytest.approx(float(exact), rel=1e-9)
    gradient = landscape.gradient(theta)
    assert (gradient @ torch.from_numpy(got["directions"]) <= 0).all()


def test_three_checkpoints_lie_on_the_grid_with_their_own_losses():
    landscape = relu_network()
    a, b, c = moved(landscape, 3)
    found = measure(landscape, a, others={"b": b, "c": c}, plane="checkpoints")
    got = arrays(found)
    assert list(got["mark"]) == ["checkpoint", "b", "c"]
    for k, theta in enumerate((a, b, c)):
        i = np.abs(got["x"] - got["mark_x"][k]).argmin()
        j = np.abs(got["y"] - got["mark_y"][k]).argmin()
        assert (got["x"][i], got["y"][j]) == (got["mark_x"][k], got["mark_y"][k])
        own = landscape.evaluate(theta)
        assert got["loss"][j, i] == pytest.approx(own.loss, rel=1e-9)
        assert got["error"][j, i] == pytest.approx(own.error)
        assert got["mark_loss"][k] == pytest.approx(own.loss)
        assert got["mark_loss_error"][k] == pytest.approx(own.loss_error)
        assert got["mark_distance"][k] == pytest.approx(0, abs=1e-9)
    assert got["mark_x"][1] == pytest.approx(float((b - a).norm()))
    span = max(np.ptp(got["mark_x"]), np.ptp(got["mark_y"]))
    assert np.ptp(got["x"]) == pytest.approx(1.5 * span) == pytest.approx(np.ptp(got["y"]))


def test_a_training_that_stays_in_a_plane_is_drawn_whole():
    landscape = relu_network()
    theta, u, v = moved(landscape, 3)
    u, v = u - theta, v - theta
    path = {e: theta + (4 - e) * u + (4 - e) ** 2 * v / 4 for e in range(5)}
    found = measure(landscape, path[4], trajectory=lambda: path, plane="trajectory")
    got, v = arrays(found), values(found)
    assert list(got["mark"]) == [*(f"epoch {e}" for e in range(4)), "checkpoint"]
    assert got["mark_distance"] == pytest.approx(0, abs=1e-9)
    assert v["explained_x"] + v["explained_y"] == pytest.approx(1) and v["out_of_plane"] < 1e-9
    for e in range(5):
        place = torch.tensor([got["mark_x"][e], got["mark_y"][e]])
        there = path[4] + torch.from_numpy(got["directions"]) @ place
        torch.testing.assert_close(there, path[e])
        assert got["mark_loss"][e] == pytest.approx(landscape.loss(path[e]))
    assert (got["mark_x"][4], got["mark_y"][4]) == (0, 0) and 0 in got["x"] and 0 in got["y"]
    # five points of a random walk: 1/sin² of 18°, 36°, 54° and 72°
    shares = 1 / np.sin(np.radians([18, 36, 54, 72])) ** 2
    assert v["random_walk_x"] == pytest.approx(shares[0] / shares.sum())


def test_a_checkpoint_out_of_the_plane_has_its_distance_and_its_own_loss():
    landscape = relu_network()
    path = dict(enumerate(moved(landscape, 5)))
    got = arrays(measure(landscape, path[4], trajectory=lambda: path, plane="trajectory"))
    U = torch.from_numpy(got["directions"])
    for e in range(4):
        offset = path[e] - path[4]
        across = offset - U @ (U.T @ offset)
        assert got["mark_distance"][e] == pytest.approx(float(across.norm())) and across.any()
        assert got["mark_loss"][e] == pytest.approx(landscape.loss(path[e]))


def test_scaling_layers_of_a_relu_network_leaves_the_filter_normalised_surface():
    landscape = relu_network()
    theta = flatten(landscape.model)
    scaled = {k: v.clone() for k, v in landscape.unflatten(theta).items()}
    for name in ("0.weight", "0.bias"):
        scaled[name] *= 7
    scaled["2.weight"] /= 7
    other = torch.cat([t.reshape(-1) for t in scaled.values()])
    one, two = (arrays(measure(landscape, t)) for t in (theta, other))
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-9)
    # the same steps without the normalisation do not fit both
    step = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).double()
    assert landscape.loss(theta) == pytest.approx(landscape.loss(other), rel=1e-9)
    assert landscape.loss(theta + step) != pytest.approx(landscape.loss(other + step), rel=0.1)


def test_batch_norm_is_recalibrated_where_points_are_far_apart():
    landscape = classifier(linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), linear(6, 3))
    a, b, c = moved(landscape, 3)
    far = measure(landscape, a, others={"b": b, "c": c}, plane="checkpoints")
    assert any("recalibrated" in note for note in far.notes) and far.converged
    for k, theta in enumerate((a, b, c)):
        own = landscape.recalibrated(theta).loss(theta)
        assert arrays(far)["mark_loss"][k] == pytest.approx(own)
        assert own != pytest.approx(landscape.loss(theta), rel=1e-3)
    near = measure(landscape, a)
    assert not near.notes and values(near)["loss"] == pytest.approx(landscape.loss(a))


# --- interruptions -------------------------------------------------------------------------------


def interrupted(after: int) -> Callable[..., None]:
    """A report that stops the measurement after so many points."""

    def report(done: int, total: int, text: str = "") -> None:
        if done == after:
            raise KeyboardInterrupt

    return report


def test_an_interrupted_surface_goes_on_where_it_stopped(monkeypatch):
    landscape, theta = quadratic()
    whole = measure(landscape, theta)
    memory: dict[str, list[float]] = {}
    with pytest.raises(KeyboardInterrupt):
        measure(landscape, theta, memory=memory, report=interrupted(20))
    assert len(memory) == 20
    passes = []
    measured = Landscape.per_sample
    monkeypatch.setattr(
        Landscape, "per_sample", lambda self, t: passes.append(1) or measured(self, t)
    )
    again = measure(landscape, theta, memory=memory)
    assert len(passes) == 49 - 20 + 2  # and the checkpoint, as the base and as the mark
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])


def test_another_plane_takes_nothing_from_the_memory():
    landscape, theta = quadratic()
    memory: dict[str, list[float]] = {}
    measure(landscape, theta, memory=memory)
    other = torch.Generator().manual_seed(1)
    measure(landscape, theta, memory=memory, rng=other)
    assert len(memory) == 2 * 49


# --- what cannot be measured ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extent": math.inf}, "extent=inf must be a finite number"),
        ({"plane": "checkpoints"}, "three checkpoints, and 1 given; name two more"),
        ({"plane": "random", "others": {"b": torch.ones(6).double()}}, "of one checkpoint"),
        ({"plane": "trajectory"}, "set train.checkpoint_every"),
    ],
)
def test_bad_input_is_told_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        measure(*quadratic(), **options)
    assert "\n" not in str(caught.value)


def test_a_landscape_without_a_sharp_direction_is_refused():
    model = Quadratic(-torch.eye(6).double())
    x = torch.ones(2, 1, dtype=torch.float64)
    landscape = Landscape(model, x, torch.zeros(2), lambda o, y: o.mean())
    with pytest.raises(InputError, match="not positive"):
        measure(landscape, flatten(model), plane="hessian")


def test_a_network_without_filters_is_refused():
    landscape = classifier(nn.BatchNorm1d(4))
    with pytest.raises(InputError, match="choose plane=hessian"):
        measure(landscape, flatten(landscape.model))


def test_points_that_overflow_are_left_blank_and_told():
    class Steep(Quadratic):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(super().forward(x) > 30, torch.inf, super().forward(x))

    model = Steep(hessian())
    x = torch.ones(3, 1, dtype=torch.float64)
    landscape = Landscape(model, x, torch.zeros(3), lambda o, y: o.mean())
    found = measure(landscape, flatten(model), extent=3.0)
    bad = int(np.isinf(arrays(found)["loss"]).sum())
    assert 0 < bad < 49 and values(found)["not_finite"] == bad
    assert f"not finite at {bad} of 49 points" in found.notes[0]
    assert np.isfinite(values(found)["highest_rise"])
    draw(found, "steep").canvas.draw()
    losses = content(interactive.pages("surface", found, "steep")["surface.html"])["grid"]["loss"]
    assert sum(value is None for row in losses for value in row) == bad


# --- the page -------------------------------------------------------------------------------------


def content(page: str) -> dict[str, Any]:
    """The numbers in a page."""
    _, _, rest = page.partition('<script type="application/json" id="data">')
    return json.loads(rest.partition("</script>")[0])


def test_the_page_holds_every_number_and_no_address():
    landscape = relu_network()
    found = measure(landscape, flatten(landscape.model))
    page = interactive.pages("surface", found, "title")["surface.html"]
    got = content(page)
    for name in ("loss", "loss_error", "rise_error", "error", "error_error"):
        np.testing.assert_allclose(got["grid"][name], arrays(found)[name], rtol=1e-7)
    assert got["marks"]["loss"] == pytest.approx(list(arrays(found)["mark_loss"]), rel=1e-7)
    assert "://" not in page and "<link" not in page and "src=" not in page
    assert not interactive.pages("lanczos", found, "title")


def test_names_on_the_page_are_text():
    landscape = relu_network()
    a, b, c = moved(landscape, 3)
    evil = "</script><script>alert(1)</script>{{title}}"
    found = measure(landscape, a, others={evil: b, "c": c}, plane="checkpoints")
    page = interactive.pages("surface", found, evil + "{{data}}")["surface.html"]
    assert page.count("<script") == page.count("</script>") == 2 and "alert(1)</script>" not in page
    assert content(page)["marks"]["name"][1] == evil
    assert "<title>&lt;/script&gt;" in page and "innerHTML" not in page
