"""The line through two networks: exact ends, barriers with their errors, alignment, batch norm."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import small_transformers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lsa.figures.interpolation import draw
from lsa.landscape import Landscape, aligning, flatten
from lsa.landscape.aligning import Moved
from lsa.landscape.network import Network
from lsa.landscape.recognition import symmetries
from lsa.maths import bootstrap
from lsa.maths.alignment.permutations import apply, permutation_spec, random_permutations
from lsa.maths.alignment.random_moves import random_moves
from lsa.maths.alignment.symmetries import transformed
from lsa.maths.paths.polyline import barriers
from lsa.probe import Result, find
from lsa.probes.interpolation import BARRIERS, _bootstrapped, _grid, interpolation
from lsa.runtime.errors import InputError
from lsa.training import data, models

pytestmark = pytest.mark.usefixtures("global_rng_untouched")
QUANTITIES = ("train_loss", "train_error", "test_loss", "test_error")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def seeded(make: Any, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def measure(landscape: Landscape, a: Tensor, b: Tensor, *, seed: int = 0, **options: Any) -> Result:
    validation = options.pop("validation", landscape)
    return interpolation(landscape, validation, a, b, generator(seed), lambda *_: None, **options)


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits", train_limit=400, val_limit=150)


def trained(digits: data.Data, name: str = "mlp", seed: int = 0, **options: Any) -> nn.Module:
    shape, rng = (1, 8, 8), generator(seed)
    model = models.build(name, input_shape=shape, classes=10, seed=seed, **options).double()
    x, y = digits.x_train.double(), digits.y_train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        for batch in torch.randperm(len(x), generator=rng).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


class Pair:
    """Two trained networks with their landscapes and what the probe says of them."""

    def __init__(self, digits: data.Data, **options: Any) -> None:
        one, two = (trained(digits, seed=seed, **options) for seed in (0, 1))
        self.landscape = Landscape(one, digits.x_train.double(), digits.y_train, chunk=150)
        self.validation = Landscape(one, digits.x_val.double(), digits.y_val)
        self.a, self.b = flatten(one), flatten(two)
        self.result = measure(self.landscape, self.a, self.b, validation=self.validation, points=25)

    def theta(self, alpha: float) -> Tensor:
        return (1 - alpha) * self.a + alpha * self.b


@pytest.fixture(scope="module")
def pair(digits: data.Data) -> Pair:
    return Pair(digits, hidden=(32, 32))


# --- the curves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [5, 25, 61])
def test_ends_are_bitwise_the_checkpoints(points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Linear(6, 3)).float()
    x, y = normal(9, 6).float(), torch.tensor([0, 1, 2] * 3)
    landscape, b = Landscape(model, x, y), flatten(model)
    a = 1e3 * normal(len(b), seed=3).float()  # a + 1·(b − a) would miss b
    assert not torch.equal(a + (b - a), b)
    seen: list[Tensor] = []
    at = Network.at
    monkeypatch.setattr(Network, "at", lambda self, t: (seen.append(t.detach()), at(self, t))[1])
    curve = measure(landscape, a, b, points=points, align="none").curves["train_loss"]
    assert curve.x[[0, -1]].tolist() == [-0.5, 1.5]
    for end, theta in ((0, a), (1, b)):
        assert sum(torch.equal(t, theta) for t in seen) >= 2  # in the train and in the test split
        assert curve.y[curve.x == end].tolist() == [landscape.evaluate(theta).loss]


def test_every_point_equals_direct_evaluation(pair: Pair) -> None:
    curves = pair.result.curves
    assert pair.landscape.n_samples % pair.landscape.chunk  # uneven chunks
    for i in (0, 5, 6, 11, 18, 24):
        theta = pair.theta(-0.5 + i / 12)
        for split, landscape in (("train", pair.landscape), ("test", pair.validation)):
            direct = landscape.evaluate(theta)
            loss, error = curves[f"{split}_loss"], curves[f"{split}_error"]
            assert loss.x[i] == pytest.approx(-0.5 + i / 12, abs=1e-15)
            assert loss.y[i] == pytest.approx(direct.loss, rel=1e-10)
            assert loss.error is not None and error.error is not None
            assert loss.error[i] == pytest.approx(direct.loss_error, rel=1e-10)
            assert (error.y[i], error.error[i]) == pytest.approx((direct.error, direct.error_error))


def test_the_chunk_does_not_matter(pair: Pair) -> None:
    landscape = pair.landscape.in_chunks(400)
    other = measure(landscape, pair.a, pair.b, validation=pair.validation, points=25)
    for name, metric in pair.result.metrics.items():
        assert other.metrics[name].value == pytest.approx(metric.value, rel=1e-9, abs=1e-12), name


def test_slopes_agree_with_finite_differences(pair: Pair) -> None:
    h, v = 1e-5, pair.b - pair.a
    for name, alpha in (("slope_a", 0), ("slope_b", 1)):
        metric = pair.result.metrics[name]
        rise = pair.landscape.loss(pair.theta(alpha + h)) - pair.landscape.loss(
            pair.theta(alpha - h)
        )
        assert metric.value == pytest.approx(rise / (2 * h), rel=1e-6)
        each = torch.cat(list(pair.landscape.sample_gradients(pair.theta(alpha)))) @ v
        assert metric.errors["data"] == pytest.approx(each.std().item() / len(each) ** 0.5)
    assert pair.result.metrics["slope_a"].value * pair.result.metrics["slope_b"].value < 0


# --- barriers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("aligned", ["", "_aligned"])
def test_the_three_barriers_are_those_of_the_curve(pair: Pair, quantity: str, aligned: str) -> None:
    curve, metrics = pair.result.curves[quantity + aligned], pair.result.metrics
    y, alpha = curve.y[6:19], curve.x[6:19]
    assert (alpha[0], alpha[-1]) == (0, 1)
    name = ("" if quantity == "train_loss" else f"_{quantity}") + aligned
    chord = (1 - alpha) * y[0] + alpha * y[-1]
    for definition, height in (
        ("barrier", max(y - chord)),
        ("barrier_mean", max(y) - (y[0] + y[-1]) / 2),
        ("barrier_max", max(y) - max(y[0], y[-1])),
    ):
        assert metrics[definition + name].value == pytest.approx(height, abs=1e-12)
    assert metrics["barrier_max" + name].value <= metrics["barrier_mean" + name].value


def test_the_error_of_a_barrier_is_paired(pair: Pair) -> None:
    curve, metric = pair.result.curves["train_loss"], pair.result.metrics["barrier"]
    between = slice(6, 19)
    alpha = curve.x[between]
    chord = (1 - alpha) * curve.y[6] + alpha * curve.y[18]
    top = alpha[(curve.y[between] - chord).argmax()]
    a, b, highest = (pair.landscape.losses(pair.theta(t)) for t in (0, 1, top))
    rise = highest - (1 - top) * a - top * b
    direct = rise.std().item() / len(rise) ** 0.5
    assert rise.mean().item() == pytest.approx(metric.value)
    # 200 resamples give a deviation to 1/√400 = 5 %: four of these.
    assert metric.errors["data"] == pytest.approx(direct, rel=0.2)


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize(
    ("height", "tilt"),
    [
        pytest.param(1.0, 0.0, marks=pytest.mark.full),
        (0.05, 0.1),
        (0.05, 0.2),
        pytest.param(0.3, 1.0, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_two_errors_of_a_barrier_cover_it_in_90_percent(
    height: float, tilt: float, n: int, record_property
) -> None:
    """Losses hᵢ·4α(1−α) + tᵢα + offset, hᵢ lognormal: steep tails, tops inside and at an end."""
    alphas = _grid(41)
    bump = 4 * alphas * (1 - alphas)
    truth = barriers((height * bump + tilt * alphas)[None], alphas)
    inside = dict.fromkeys(BARRIERS, 0)
    sets = 400
    for seed in range(sets):
        h = height * (normal(n, seed=3 * seed) - 0.5).exp()
        t = tilt + 0.3 * normal(n, seed=3 * seed + 1)
        offset = 2 * normal(n, seed=3 * seed + 2)
        table = bump[:, None] * h + alphas[:, None] * t + offset
        heights = barriers(bootstrap.means({"loss": table}, generator(seed))["loss"], alphas)
        for name, definition in BARRIERS.items():
            metric = _bootstrapped(getattr(heights, definition), "loss")
            off = abs(metric.value - getattr(truth, definition).item())
            inside[name] += off <= 2 * metric.errors["data"] + 1e-12
    for name, count in inside.items():
        label = f"{name}, height {height:g}, tilt {tilt:g}, {n} samples"
        record_property("coverage", [label, "data", "90 %", count / sets, sets])
    assert min(inside.values()) >= 0.9 * sets, inside


def test_what_is_common_to_all_points_cancels_in_the_error() -> None:
    # Two samples' losses differ a hundredfold, but by the same everywhere on the line.
    offset = 100 * normal(80, 1)
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 1, bias=False)))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return (y + torch.cos(outputs)).mean()

    landscape = Landscape(model, torch.ones(80, 1).double() + 0.01 * normal(80, 1), offset, loss)
    a, b = torch.tensor([-torch.pi]).double(), torch.tensor([torch.pi]).double()
    result = measure(landscape, a, b, points=41)
    assert result.metrics["barrier"].value == pytest.approx(2, abs=0.01)
    assert result.metrics["barrier"].errors["data"] < 0.01
    error = result.curves["train_loss"].error
    assert error is not None and error.min() > 5


def test_a_convex_loss_has_no_barrier(digits: data.Data) -> None:
    model = models.build("mlp", input_shape=(1, 8, 8), classes=10, seed=0, hidden=()).double()
    landscape = Landscape(model, digits.x_train.double(), digits.y_train)
    a, b = normal(650, seed=2), normal(650, seed=3)
    result = measure(landscape, a, b, points=25)
    y = result.curves["train_loss"].y
    assert (y[2:] + y[:-2] > 2 * y[1:-1]).all()
    assert 0 <= result.metrics["barrier"].value < 1e-12
    assert result.metrics["barrier"].errors["data"] < 1e-12
    assert result.metrics["slope_a"].value < y[18] - y[6] < result.metrics["slope_b"].value
    assert result.metrics["units_moved"].value == 0  # no hidden units


def test_the_lowest_point_and_its_error_are_those_of_a_mean() -> None:
    # ∑(w − xᵢ)² from w = 0 to 1 is lowest at the mean of x.
    x = 0.4 + normal(100, 1)
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 1, bias=False)))
    landscape = Landscape(model, torch.ones(100, 1).double(), x, F.mse_loss)
    ends = torch.zeros(1).double(), torch.ones(1).double()
    metric = measure(landscape, *ends, points=201).metrics["alpha_min"]
    assert metric.value == pytest.approx(x.mean().item(), abs=0.005 + 1e-12)  # half a step
    assert metric.errors["data"] == pytest.approx(x.std().item() / 10, rel=0.2)
    assert metric.errors["grid"] == pytest.approx(0.01 / 12**0.5)


def test_sizes_and_distances(pair: Pair) -> None:
    values = {name: metric.value for name, metric in pair.result.metrics.items()}
    assert values["norm_a"] == pytest.approx(pair.a.norm().item())
    assert values["norm_b"] == pytest.approx(pair.b.norm().item())
    assert values["distance"] == pytest.approx((pair.b - pair.a).norm().item())
    assert values["distance_aligned"] < values["distance"]
    assert (values["n_samples"], values["n_samples_test"]) == (400, 150)


# --- alignment ------------------------------------------------------------------------------------


def test_a_permuted_copy_has_a_barrier_until_it_is_aligned(pair: Pair) -> None:
    model = pair.landscape.model
    spec = permutation_spec(model)
    renumbered = copy.deepcopy(model)
    renumbered.load_state_dict(
        apply(spec, random_permutations(spec, generator()), model.state_dict())
    )
    result = measure(pair.landscape, pair.a, flatten(renumbered), points=13)
    assert result.metrics["barrier"].value > 0.5
    assert result.metrics["barrier_aligned"].value < 1e-10
    assert result.metrics["distance_aligned"].value == 0
    assert result.metrics["units_moved"].value > 0.9
    same = result.curves["train_loss_aligned"].y
    assert np.abs(same - same[0]).max() < 1e-12 < np.ptp(result.curves["train_loss"].y)


def test_aligning_independent_networks_lowers_the_barrier(pair: Pair) -> None:
    metrics, curves = pair.result.metrics, pair.result.curves
    assert metrics["barrier_aligned"].value < metrics["barrier"].value / 2
    assert metrics["barrier"].value > 10 * metrics["barrier"].errors["data"]
    for quantity in QUANTITIES:  # the same function at the end, in another order
        plain, aligned = curves[quantity].y, curves[f"{quantity}_aligned"].y
        assert aligned[18] == pytest.approx(plain[18], rel=1e-10)
        assert np.abs(aligned - plain)[7:18].max() > 0.01


def test_networks_already_aligned_have_one_line(pair: Pair, monkeypatch: Any) -> None:
    near = pair.a + 1e-3 * normal(len(pair.a))
    seen: list[Tensor] = []
    original = Landscape.recalibrated
    monkeypatch.setattr(
        Landscape, "recalibrated", lambda self, t: (seen.append(t), original(self, t))[1]
    )
    result = measure(pair.landscape, pair.a, near, points=9)
    assert len(seen) == 9 and result.metrics["units_moved"].value == 0
    y = {name: curve.y.tolist() for name, curve in result.curves.items()}
    assert all(y[name] == y[f"{name}_aligned"] for name in QUANTITIES)


def test_a_transformer_is_aligned() -> None:
    at = small_transformers.landscape(small_transformers.made("rotary"))
    known = symmetries(at, at.theta)
    moved = transformed(known, random_moves(known, generator()), at.unflatten(at.theta))
    copied = torch.cat([t.reshape(-1) for t in moved.values()])
    result = measure(at, at.theta, copied, points=9)
    loss = result.curves["train_loss_aligned"].y
    assert np.ptp(loss) < 1e-9 < np.ptp(result.curves["train_loss"].y)
    assert result.metrics["distance_aligned"].value < 1e-8 < result.metrics["distance"].value
    assert not any("aligned" in note for note in result.notes)


def test_an_alignment_that_raises_the_barrier_is_not_taken(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = permutation_spec(pair.landscape.model)
    orders = random_permutations(spec, generator(5))
    shuffled = apply(spec, orders, pair.landscape.unflatten(pair.b))
    away = Moved(torch.cat([t.reshape(-1) for t in shuffled.values()]), 1.0, converged=True)
    monkeypatch.setattr(aligning, "align", lambda *_: away)
    result = measure(pair.landscape, pair.a, pair.b, points=9, validation=pair.validation)
    for name in ("barrier", "barrier_max_test_error", "distance"):
        assert result.metrics[f"{name}_aligned"].value == result.metrics[name].value
    assert any("has the higher barrier" in note for note in result.notes)


def test_without_alignment_there_is_one_line(pair: Pair) -> None:
    result = measure(pair.landscape, pair.a, pair.b, points=5, align="none")
    assert set(result.curves) == set(QUANTITIES)
    assert not [name for name in result.metrics if "aligned" in name]
    assert result.notes == ()


def test_what_cannot_be_aligned_is_measured_and_said() -> None:
    group = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3)
        )
    )
    x, y = normal(12, 1, 5, 5), torch.tensor([0, 1, 2] * 4)
    frozen = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    frozen[0].requires_grad_(False)
    for model, inputs, reason in ((group, x, "GroupNorm"), (frozen, normal(12, 4), "frozen")):
        landscape, a = Landscape(model, inputs, y), flatten(model)
        result = measure(landscape, a, -a, points=5)
        (note,) = (n for n in result.notes if reason in n)
        assert note.startswith("no aligned line: ") and "\n" not in note
        assert "barrier" in result.metrics and "barrier_aligned" not in result.metrics


# --- batch norm -----------------------------------------------------------------------------------


def test_batch_norm_is_recalibrated_at_every_point(digits: data.Data) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10)
        )

    model, other = seeded(make), seeded(make, 1)
    x, y = digits.x_train.double()[:100], digits.y_train[:100]
    model.train()
    model(x)
    before = copy.deepcopy(model.state_dict())
    landscape = Landscape(model, x, y)
    validation = landscape.with_data(digits.x_val.double(), digits.y_val)
    stale = copy.deepcopy(landscape.model.state_dict())
    a, b = flatten(model), flatten(other)
    result = measure(landscape, a, b, validation=validation, points=9)
    unadapted = []
    for alpha, loss, test in zip(
        result.curves["train_loss"].x,
        result.curves["train_loss"].y,
        result.curves["test_loss"].y,
        strict=True,
    ):
        tensors = landscape.unflatten((1 - alpha) * a + alpha * b)
        hidden = F.linear(x.flatten(1), tensors["1.weight"], tensors["1.bias"])
        tensors |= {"2.running_mean": hidden.mean(0), "2.running_var": hidden.var(0)}
        for images, labels, found in ((x, y, loss), (validation.x, validation.y, test)):
            outputs = functional_call(landscape.model, tensors, (images,))
            assert found == pytest.approx(F.cross_entropy(outputs, labels).item(), rel=1e-9)
        unadapted.append(landscape.loss((1 - alpha) * a + alpha * b))
    assert np.abs(np.array(unadapted) - result.curves["train_loss"].y).max() > 0.1
    assert any("batch norm was recalibrated" in note for note in result.notes)
    # Renumbered units keep their statistics: the aligned end is the same function.
    assert result.curves["train_loss_aligned"].y[6] == pytest.approx(
        result.curves["train_loss"].y[6], rel=1e-9
    )
    for kept, state in ((before, model.state_dict()), (stale, landscape.model.state_dict())):
        assert all(torch.equal(kept[name], tensor) for name, tensor in state.items())
    assert model.training and all(p.grad is None for p in model.parameters())


# --- what is not a number -------------------------------------------------------------------------


def line(loss: Any, a: float, b: float, n: int = 6, **options: Any) -> Result:
    """A model w·1 from w = a to b with any loss of w."""
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 1, bias=False)))
    landscape = Landscape(
        model, torch.ones(n, 1).double(), torch.zeros(n, 1).double(), lambda o, y: loss(o).mean()
    )
    ends = (torch.tensor([value], dtype=torch.float64) for value in (a, b))
    return measure(landscape, *ends, **options)


def test_a_loss_that_is_not_finite_outside_leaves_the_barrier() -> None:
    result = line(torch.log, 1.0, 0.21, points=25)  # w < 0 for α > 1.266
    y = result.curves["train_loss"].y
    assert np.isnan(y[22:]).all() and np.isfinite(y[:22]).all()
    assert result.metrics["barrier"].value == pytest.approx(
        max(np.log(1 - 0.79 * t) - t * np.log(0.21) for t in np.linspace(0, 1, 13))
    )
    assert result.metrics["alpha_min"].value == pytest.approx(1.25)
    assert any("train_loss is not finite at 3 of 25 points" in note for note in result.notes)
    draw(result, "t").draw_without_rendering()


def test_a_nan_between_the_ends_stays_a_nan() -> None:
    result = line(lambda o: torch.where((o - 0.5).abs() < 0.1, torch.nan, o**2), 0.0, 1.0)
    metric = result.metrics["barrier"]
    assert np.isnan(metric.value) and metric.errors == {}
    assert result.metrics["alpha_min"].value == 0
    nowhere = line(lambda o: o * torch.nan, 0.0, 1.0).metrics
    assert np.isnan(nowhere["alpha_min"].value) and np.isnan(nowhere["slope_a"].value)


def test_a_minimum_beyond_the_grid_is_said() -> None:
    beyond = line(torch.exp, 0.0, -1.0)
    assert beyond.metrics["alpha_min"].value == 1.5
    assert any("its minimum lies beyond" in note for note in beyond.notes)
    assert not line(torch.square, -0.2, 0.8).notes


def test_one_sample_has_no_error() -> None:
    result = line(torch.sin, -1.0, 2.0, n=1)
    assert result.curves["train_loss"].error is None
    assert all("data" not in metric.errors for metric in result.metrics.values())


def test_a_task_without_classes_has_no_misclassification() -> None:
    assert set(line(torch.sin, -1.0, 2.0, align="none").curves) == {"train_loss", "test_loss"}


# --- the declaration ------------------------------------------------------------------------------


def test_ends_that_make_no_line_are_refused(pair: Pair) -> None:
    for b, message in (
        (pair.a.clone(), "the same point"),
        (pair.b[:-1], "must be vectors of d="),
        (pair.b.index_fill(0, torch.tensor([3]), torch.inf), "not finite"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            measure(pair.landscape, pair.a, b)
        assert "\n" not in str(caught.value)


def test_one_seed_gives_one_result(pair: Pair) -> None:
    options = {"validation": pair.validation, "points": 25}
    again = measure(pair.landscape, pair.a, pair.b, **options)
    assert again.metrics == pair.result.metrics and again.notes == pair.result.notes
    other = measure(pair.landscape, pair.a, pair.b, seed=1, **options)
    assert other.metrics["barrier"].value == again.metrics["barrier"].value
    assert other.metrics["barrier"].errors != again.metrics["barrier"].errors


def test_progress_counts_the_points_of_both_lines(pair: Pair) -> None:
    told: list[tuple[int, int]] = []
    interpolation(
        *(pair.landscape, pair.validation, pair.a, pair.b, generator()),
        lambda done, total, text="": told.append((done, total)),
        points=5,
    )
    assert told == [(i + 1, 10) for i in range(10)]


def test_names_do_not_collide(pair: Pair) -> None:
    declared, result = find("interpolation"), pair.result
    assert declared.pair and set(declared.options) == {"points", "align"}
    assert set(declared.headline) <= set(result.metrics)
    names = [*result.metrics, *result.curves, "alpha", "converged"]
    assert len(names) == len(set(names))
    assert set(result.arrays) == {f"interp_data.{name}" for name in ("alpha", *result.curves)}
    assert {curve.x_name for curve in result.curves.values()} == {"alpha"}


# --- the figure -----------------------------------------------------------------------------------


def test_the_figure_shows_all_curves_and_the_barriers(pair: Pair) -> None:
    loss, error = draw(pair.result, "sgd and adamw").axes
    for axes, kind in ((loss, "loss"), (error, "error")):
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        assert texts == [f"{s} {kind}{a}" for a in ("", " aligned") for s in ("train", "test")]
    metric = pair.result.metrics["barrier"]
    assert f"{metric.value:.3g} ± {2 * metric.errors['data']:.2g}" in loss.get_title()
    assert error.get_lines()[0].get_ydata()[0] == 100 * pair.result.curves["train_error"].y[0]
    assert error.get_yscale() == "linear"


def test_losses_over_two_decades_have_a_logarithmic_axis() -> None:
    for scale, expected in ((1.0, "linear"), (6.0, "log")):
        result = line(torch.exp, 0.0, scale, points=5)
        (axes,) = draw(result, "t").axes
        assert axes.get_yscale() == expected
