"""The probe `auto_neb` on small networks: what bounds the path, its errors, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsa.figures import draw
from lsa.landscape import Landscape, flatten
from lsa.landscape.energies import gradient_by_batches, mini_batches
from lsa.maths.paths.polyline import refine
from lsa.probe import Result, find
from lsa.probes.auto_neb import auto_neb
from lsa.runtime.errors import InputError
from lsa.training import data, models

QUICK = {"curve_steps": 20, "cycles": 2, "steps": 3, "pivots": 2, "between": 2, "lr": 0.05}


class Pair:
    """Two networks of one architecture, trained on the same digits from different weights."""

    def __init__(self, make, epochs: int = 60, samples: int = 300) -> None:
        split = data.load("digits", train_limit=samples, val_limit=100)
        networks = []
        for seed, rule in enumerate((torch.optim.SGD, torch.optim.AdamW)):
            network = make(seed)
            optimizer = rule(network.parameters(), lr=0.5 if rule is torch.optim.SGD else 0.01)
            for _ in range(epochs):
                optimizer.zero_grad()
                F.cross_entropy(network(split.x_train), split.y_train).backward()
                optimizer.step()
            networks.append(network)
        self.model = networks[0]
        self.training = Landscape(self.model, split.x_train, split.y_train)
        self.landscape = self.training.subset(torch.arange(200))
        self.validation = self.training.with_data(split.x_val, split.y_val)
        self.a, self.b = map(flatten, networks)

    def search(self, a: Tensor | None = None, b: Tensor | None = None, **options) -> Result:
        ends = (self.a if a is None else a, self.b if b is None else b)
        places = (self.landscape, self.training, self.validation)
        rng = torch.Generator().manual_seed(options.pop("seed", 0))
        report = options.pop("report", lambda *_: None)
        return auto_neb(*places, *ends, rng, report, **(QUICK | options))


def mlp(seed: int, hidden: tuple[int, ...] = (16,)) -> nn.Module:
    return models.build("mlp", input_shape=(1, 8, 8), classes=10, seed=seed, hidden=hidden)


def seeded(*layers) -> nn.Module:
    """Layers made by the given functions, from a seed, the global random state left as it was."""
    seed, *makers = layers
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(*(make() for make in makers))


def batch_normed(seed: int) -> nn.Module:
    layers = (lambda: nn.Linear(64, 16), lambda: nn.BatchNorm1d(16), nn.ReLU)
    return seeded(seed, nn.Flatten, *layers, lambda: nn.Linear(16, 10))


def saturating(seed: int) -> nn.Module:
    """Logits that are not linear in the last layer: a zero head gives ln C, scaling bounds not."""
    layers = (lambda: nn.Linear(64, 16), nn.ReLU, lambda: nn.Linear(16, 10))
    return seeded(seed, nn.Flatten, *layers, nn.Softsign)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(mlp)


@pytest.fixture(scope="module")
def quick(pair: Pair) -> Result:
    return pair.search()


@pytest.fixture(scope="module")
def normed() -> Pair:
    return Pair(batch_normed, epochs=30)


def value(result: Result, name: str) -> float:
    return result.metrics[name].value


def nodes(result: Result) -> Tensor:
    names = sorted(name for name in result.arrays if name.startswith("node_"))
    return torch.from_numpy(np.stack([result.arrays[name] for name in names]))


def loss_bound(pair: Pair, a: Tensor, b: Tensor) -> float:
    return max(pair.landscape.loss(a), pair.landscape.loss(b), math.log(10))


# --- what bounds the path -------------------------------------------------------------------------


def test_the_path_is_far_below_the_straight_line(pair: Pair) -> None:
    found = pair.search(curve_steps=200, cycles=2, steps=20, pivots=3)
    ends = max(pair.landscape.loss(pair.a), pair.landscape.loss(pair.b))
    straight = max(
        pair.landscape.loss(torch.lerp(pair.a, pair.b, t)) for t in torch.arange(0, 1, 0.1)
    )
    assert value(found, "linear_max") >= straight - 1e-2
    assert value(found, "linear_max") > ends + 0.2  # otherwise this shows nothing
    assert value(found, "path_loss") - ends < 0.3 * (value(found, "linear_max") - ends)
    assert value(found, "barrier") == pytest.approx(value(found, "path_loss") - ends, abs=1e-6)


def test_the_curve_is_reported_before_it_is_relaxed(pair: Pair) -> None:
    curve = pair.search(curve_steps=200, cycles=0, pivots=3)
    assert any("the path is the trained curve" in note for note in curve.notes)
    assert curve.metrics["curve_barrier"] == curve.metrics["barrier"]
    relaxed = pair.search(curve_steps=200, cycles=2, steps=20, pivots=3)
    assert relaxed.metrics["curve_barrier"] == curve.metrics["barrier"]  # the same curve
    assert value(relaxed, "barrier") <= value(relaxed, "curve_barrier")
    assert "curve_barrier" not in pair.search(start="line", steps=0).metrics


@pytest.mark.parametrize("options", [{"cycles": 0, "start": "line"}, {"steps": 0}, {"lr": 30.0}])
def test_no_budget_exceeds_ln_c(pair: Pair, options: dict) -> None:
    a, b = 6 * pair.a, 6 * pair.b  # a straight line far above ln C
    found = pair.search(a, b, **options)
    assert value(found, "linear_max") > loss_bound(pair, a, b) + 0.1
    assert value(found, "path_loss") <= loss_bound(pair, a, b) + 1e-5
    expected = loss_bound(pair, a, b) - value(found, "path_loss")
    assert value(found, "bound_margin") == pytest.approx(expected, abs=1e-5)


def test_the_collapsed_head_is_called_what_it_is(pair: Pair) -> None:
    found = pair.search(6 * pair.a, 6 * pair.b, cycles=0, start="line")
    assert value(found, "path_loss") == pytest.approx(math.log(10), abs=1e-5)
    assert any("head-collapse baseline" in note for note in found.notes)
    middle = nodes(found)[1]
    assert pair.training.loss(middle) == pytest.approx(math.log(10), abs=1e-5)
    head = slice(16 * 65, None)
    assert not middle[head].any() and torch.equal(middle[: 16 * 65], 6 * pair.a[: 16 * 65])
    assert not found.converged


def test_a_path_to_a_permuted_copy_is_below_the_straight_line(pair: Pair) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    p = pair.landscape.unflatten(pair.a)
    w1, b1, w2, b2 = p.values()
    copy = torch.cat([x.flatten() for x in (w1[order], b1[order], w2[:, order], b2)])
    assert pair.landscape.loss(copy) == pytest.approx(pair.landscape.loss(pair.a), abs=1e-6)
    found = pair.search(pair.a, copy, curve_steps=200, cycles=1, steps=10)
    assert value(found, "linear_max") > pair.landscape.loss(pair.a) + 0.1
    assert value(found, "barrier") < 0.5 * (value(found, "linear_max") - pair.landscape.loss(copy))


def test_a_convex_loss_has_no_barrier() -> None:
    convex = Pair(lambda seed: mlp(seed, hidden=()), epochs=10)
    found = convex.search()
    assert value(found, "path_loss") == pytest.approx(
        max(convex.landscape.loss(convex.a), convex.landscape.loss(convex.b)), abs=1e-6
    )
    assert value(found, "barrier") == pytest.approx(0, abs=1e-9)
    assert found.metrics["barrier"].errors["data"] == pytest.approx(0, abs=1e-9)


# --- every number against a direct computation ----------------------------------------------------


def test_the_dense_maximum_is_what_is_reported(pair: Pair, quick: Result) -> None:
    points = refine(nodes(quick), 2)
    direct = torch.tensor([pair.landscape.loss(point) for point in points]).double()
    torch.testing.assert_close(
        torch.from_numpy(quick.arrays["energies"]), direct, atol=1e-6, rtol=0
    )
    heights = quick.arrays["cycle_max"]
    assert len(heights) == 2 and heights.min() >= quick.arrays["energies"].max()
    assert value(quick, "path_loss") == pytest.approx(direct.max().item(), abs=1e-6)
    assert value(quick, "path_loss") >= direct[::3].max().item() - 1e-9
    assert value(quick, "n_pivots") == len(nodes(quick)) == (len(points) - 1) // 3 + 1
    assert torch.equal(nodes(quick)[[0, -1]], torch.stack([pair.a, pair.b]))
    assert nodes(quick).dtype == torch.float32


def test_errors_are_paired_over_the_samples(pair: Pair, quick: Result) -> None:
    points = refine(nodes(quick), 2)
    top = points[int(quick.arrays["energies"].argmax())]
    worse = max((pair.a, pair.b), key=pair.landscape.loss)
    high, low = (pair.landscape.losses(theta).double() for theta in (top, worse))
    n = pair.landscape.n_samples
    paired = (high - low).std().item() / n**0.5
    assert quick.metrics["barrier"].errors["data"] == pytest.approx(paired, rel=1e-4)
    assert quick.metrics["path_loss"].errors["data"] == pytest.approx(
        high.std().item() / n**0.5, rel=1e-4
    )
    evaluation = pair.landscape.evaluate(top)
    assert value(quick, "saddle_train_error") == pytest.approx(evaluation.error)


def test_the_saddle_on_the_held_out_split(pair: Pair, quick: Result) -> None:
    top = refine(nodes(quick), 2)[int(quick.arrays["energies"].argmax())]
    saddle, a, b = (pair.validation.evaluate(theta) for theta in (top, pair.a, pair.b))
    assert value(quick, "saddle_test_loss") == pytest.approx(saddle.loss, abs=1e-6)
    assert value(quick, "saddle_test_error") == pytest.approx(saddle.error)
    assert quick.metrics["saddle_test_error"].errors["data"] == pytest.approx(saddle.error_error)
    rise = saddle.error - max(a.error, b.error)
    assert value(quick, "test_error_rise") == pytest.approx(rise, abs=1e-9)


def test_the_gradient_across_the_path_is_that_of_the_whole_landscape(
    pair: Pair, quick: Result
) -> None:
    points = refine(nodes(quick), 2).double()
    i = int(quick.arrays["energies"].argmax())
    g = pair.landscape.gradient(points[i].float()).double()
    # Inside a segment the tangent is the segment's; at a pivot it lies between both segments'.
    before, after = points[i] - points[i - 1], points[i + 1] - points[i]
    norms = []
    for share in torch.linspace(0, 1, 101):
        tau = F.normalize(share * before + (1 - share) * after, dim=0)
        norms.append((g - (g @ tau) * tau).norm().item())
    found = value(quick, "perp_grad_norm")
    assert min(norms) - 1e-6 <= found <= max(norms) + 1e-6
    assert found**2 + (value(quick, "cosine") * g.norm().item()) ** 2 == pytest.approx(
        g.norm().item() ** 2, rel=1e-4
    )


def test_curves_share_one_grid_and_end_at_the_endpoints(pair: Pair, quick: Result) -> None:
    ends = [pair.landscape.loss(theta) for theta in (pair.a, pair.b)]
    tested = [pair.validation.loss(theta) for theta in (pair.a, pair.b)]
    for name, expected in (("train_loss", ends), ("linear_loss", ends), ("test_loss", tested)):
        curve = quick.curves[name]
        assert np.array_equal(curve.x, np.linspace(0, 1, 61))
        assert curve.y[[0, -1]] == pytest.approx(expected, abs=1e-6)
    names = {*quick.curves, *quick.metrics, *(c.x_name for c in quick.curves.values())}
    assert len(names) == len(quick.curves) + len(quick.metrics) + 1
    middle = pair.landscape.loss(torch.lerp(pair.a, pair.b, 1 / 3))  # a pivot of the line
    assert quick.curves["linear_loss"].y[20] == pytest.approx(middle, abs=1e-4)


def test_every_evaluation_is_counted(pair: Pair, monkeypatch) -> None:
    gradients, batches = [], watched(monkeypatch)
    original = Landscape.loss_and_gradient

    def counted(self, theta):
        gradients.append(self.n_samples)
        return original(self, theta)

    monkeypatch.setattr(Landscape, "loss_and_gradient", counted)
    found = pair.search(batch_size=32)
    assert [len(x) for x in batches] == [32] * int(value(found, "grad_evals"))
    assert gradients == [200]  # the saddle's


def test_pivots_of_a_step_share_one_batch_and_steps_do_not(pair: Pair, monkeypatch) -> None:
    drawn = watched(monkeypatch)
    found = pair.search(start="line", cycles=1, steps=4, batch_size=32)
    whole = pair.training.x.flatten(1)
    batches = [
        tuple((x.flatten(1)[:, None] == whole).all(2).nonzero()[:, 1].tolist()) for x in drawn
    ]
    assert value(found, "grad_evals") == len(batches) == 5 * 4
    steps = [set(batches[i : i + 4]) for i in range(0, 20, 4)]
    assert [len(step) for step in steps] == [1] * 5  # of the 4 pivots' 5 evaluations each
    assert len(set(batches)) == 5
    assert max(map(max, batches)) >= 200  # from the whole training split, not the landscape's
    assert all(len(set(batch)) == 32 for batch in batches)


def watched(monkeypatch) -> list[Tensor]:
    """The inputs of every mini-batch on which a gradient is computed from now on."""
    seen: list[Tensor] = []
    original = Landscape.batch_gradient

    def watching(self):
        gradient_on = original(self)

        def on(theta, x, y):
            seen.append(x)
            return gradient_on(theta, x, y)

        return on

    monkeypatch.setattr(Landscape, "batch_gradient", watching)
    return seen


# --- batch norm -----------------------------------------------------------------------------------


def test_batch_norm_points_are_judged_with_their_own_statistics(normed: Pair) -> None:
    before = {k: v.clone() for k, v in normed.training.model.state_dict().items()}
    found = normed.search(curve_steps=100, steps=5)
    for point, energy in zip(refine(nodes(found), 2), found.arrays["energies"], strict=True):
        own = normed.landscape.recalibrated(point)
        assert own.loss(point) == pytest.approx(energy, abs=1e-6)
    top = refine(nodes(found), 2)[int(found.arrays["energies"].argmax())]
    own = normed.landscape.recalibrated(top).with_data(normed.validation.x, normed.validation.y)
    assert value(found, "saddle_test_loss") == pytest.approx(own.loss(top), abs=1e-6)
    assert abs(own.loss(top) - normed.validation.loss(top)) > 1e-3  # otherwise this shows nothing
    assert value(found, "path_loss") < 0.7 * value(found, "linear_max")
    assert value(found, "path_loss") <= math.log(10) + 1e-5
    after = normed.training.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_batch_norm_bound_holds_with_the_collapsed_head(normed: Pair) -> None:
    """Statistics of the trunk do not depend on the head, so the bound survives recalibration."""
    a, b = normed.a.clone(), normed.b.clone()
    for theta in (a, b):
        theta[-170:] *= 100
    found = normed.search(a, b, cycles=0, start="line")
    assert value(found, "linear_max") > value(found, "log_classes") + 0.1
    ends = max(normed.landscape.recalibrated(theta).loss(theta) for theta in (a, b))
    assert value(found, "path_loss") <= max(ends, math.log(10)) + 1e-5


def test_batch_norm_gradients_contain_the_statistics(normed: Pair) -> None:
    """Under batch statistics the weights before the norm have no gradient along themselves."""
    rng = torch.Generator().manual_seed(0)
    _, (mini,) = mini_batches(normed.training, 64, rng)(normed.a[None], 0)
    for g in (mini.double(), gradient_by_batches(normed.landscape, normed.a, 64)):
        first = slice(0, 16 * 64)
        w = normed.a[first].double()
        cosine = (g[first] @ w / (g[first].norm() * w.norm())).abs().item()
        assert cosine < 1e-3


# --- networks without the bound -------------------------------------------------------------------


def test_a_head_that_is_not_linear_gives_no_bound() -> None:
    strange = Pair(saturating, epochs=5)
    found = strange.search(steps=1)
    assert "log_classes" not in found.metrics and "bound_margin" not in found.metrics
    assert any("no head-collapse baseline" in note for note in found.notes)
    assert value(found, "path_loss") <= value(found, "linear_max") + 1e-9
    draw.figures("auto_neb", found, "without")


def test_a_loss_that_is_not_cross_entropy_gives_no_bound(pair: Pair) -> None:
    def squared(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - F.one_hot(y, 10)).square().mean()

    x, y = pair.landscape.x, pair.landscape.y
    place = Landscape(pair.model, x, y, squared)
    rng = torch.Generator().manual_seed(0)
    found = auto_neb(place, place, place, pair.a, pair.b, rng, lambda *_: None, **QUICK)
    assert "log_classes" not in found.metrics
    assert value(found, "path_loss") <= value(found, "linear_max")


def test_the_head_is_found_wherever_it_is_registered() -> None:
    class Backwards(nn.Module):
        """Head registered before the trunk."""

        def __init__(self) -> None:
            super().__init__()
            self.head, self.trunk = nn.Linear(16, 10), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.trunk(x.flatten(1))))

    found = Pair(lambda seed: seeded(seed, Backwards), epochs=5).search(steps=1)
    assert value(found, "log_classes") == pytest.approx(math.log(10))


# --- how a search ends ----------------------------------------------------------------------------


def test_why_the_search_ended_is_noted(pair: Pair, quick: Result) -> None:
    assert any("budget of 3 steps spent" in note for note in quick.notes) and not quick.converged
    loose = pair.search(batch_size=10_000, tol=10.0)  # more than there are: all of them
    assert any("converged" in note for note in loose.notes)


def test_a_search_that_diverges_keeps_what_is_known(pair: Pair) -> None:
    found = pair.search(start="line", lr=1e30, steps=20)
    assert any("energy is" in note or "gradient is not finite" in note for note in found.notes)
    assert value(found, "path_loss") <= min(value(found, "linear_max"), math.log(10)) + 1e-5
    found = pair.search(start="curve", lr=1e30, steps=20)
    assert any("trained curve is higher" in note for note in found.notes)
    assert math.isfinite(value(found, "path_loss"))


def test_the_string_method_is_another_relaxation(pair: Pair, quick: Result) -> None:
    other = pair.search(method="string")
    assert value(other, "path_loss") < value(other, "linear_max")
    assert not np.array_equal(other.arrays["node_01"], quick.arrays["node_01"])


def test_runs_repeat_and_use_no_global_state(
    pair: Pair, quick: Result, global_rng_untouched
) -> None:
    weights = {k: v.clone() for k, v in pair.model.state_dict().items()}
    mode = pair.model.training
    again, other = pair.search(), pair.search(seed=1)
    assert again.metrics == quick.metrics and again.notes == quick.notes
    assert all(np.array_equal(again.arrays[k], quick.arrays[k]) for k in quick.arrays)
    assert not np.array_equal(other.arrays["node_01"], quick.arrays["node_01"])
    assert all(torch.equal(v, weights[k]) for k, v in pair.model.state_dict().items())
    assert pair.model.training == mode


def test_progress_runs_to_the_end(pair: Pair) -> None:
    seen = []
    pair.search(report=lambda done, total, text="": seen.append((done, total)))
    assert {total for _, total in seen} == {20 + 2 * 3}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (26, 26)


def test_the_figure_shows_path_line_and_maximum(quick: Result) -> None:
    (figure,) = draw.figures("auto_neb", quick, "a pair").values()
    (plot,) = figure.axes
    written = [text.get_text() for text in plot.texts]
    assert any(text.startswith("ln C = 2.3") for text in written)
    assert any(f"{value(quick, 'path_loss'):.3g} ±" in text for text in written)
    path = next(line for line in plot.lines if line.get_label() == "pivots")
    assert len(path.get_xdata()) == value(quick, "n_pivots")


def test_bad_checkpoints_are_refused(pair: Pair) -> None:
    with pytest.raises(InputError, match="same point"):
        pair.search(pair.a, pair.a.clone())
    with pytest.raises(InputError, match="of this network"):
        pair.search(pair.a, pair.b[:-1])
    with pytest.raises(InputError, match="of this network"):
        pair.search(pair.a[:-1], pair.b[:-1])


def test_the_declaration(quick: Result) -> None:
    declared = find("auto_neb")
    assert declared.pair and declared.headline == ("path_loss", "barrier")
    assert set(declared.headline) <= set(quick.metrics)
