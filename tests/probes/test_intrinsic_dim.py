"""d90 on digits: what the search finds, what a checkpoint changes in it, and what is said."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lsa.figures.intrinsic_dim import draw
from lsa.landscape import Landscape, flatten
from lsa.maths.crossing import crossing, search
from lsa.maths.subspaces import make_projection
from lsa.probe import Result, Sizes, find
from lsa.probes.intrinsic_dim import _falling, _part, intrinsic_dim
from lsa.runtime.errors import InputError
from lsa.training import data, models

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

QUICK: dict[str, Any] = {"subspaces": 2, "epochs": 4, "batch_size": 32, "lr": 0.01}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def net() -> SimpleNamespace:
    """An mlp on digits: both landscapes, the start, and two checkpoints of different accuracy."""
    split = data.load("digits", train_limit=600)
    model = models.build("mlp", input_shape=(1, 8, 8), classes=10, seed=0, hidden=(24,))
    start, optimizer, points = flatten(model), torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(split.x_train), split.y_train).backward()
        optimizer.step()
        points.append(flatten(model))
    training = Landscape(model, split.x_train, split.y_train)
    validation = training.with_data(split.x_val, split.y_val)
    return SimpleNamespace(
        training=training, validation=validation, start=start, theta=points[-1], worse=points[9]
    )


def measure(net: SimpleNamespace, theta: Tensor | None = None, seed: int = 0, **options) -> Result:
    return intrinsic_dim(
        net.training,
        net.validation,
        net.theta if theta is None else theta,
        options.pop("start", net.start),
        generator(seed),
        options.pop("report", lambda *_: None),
        **(QUICK | options),
    )


@pytest.fixture(scope="module")
def found(net: SimpleNamespace) -> Result:
    return measure(net)


def values(result: Result) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def means(result: Result) -> dict[int, float]:
    y = result.arrays["accuracies"].mean(0)
    return dict(zip(result.arrays["dimensions"].tolist(), y.tolist(), strict=True))


# --- the search -----------------------------------------------------------------------------------


def test_accuracy_rises_from_chance_to_the_baseline(net, found):
    v, at = values(found), means(found)
    assert v["baseline_local"] == 1 - net.validation.evaluate(net.theta).error > 0.9
    assert v["threshold"] == pytest.approx(0.9 * v["baseline_local"])
    assert v["accuracy_at_start"] == 1 - net.validation.evaluate(net.start).error < 0.2
    # Ten classes, 360 images: chance has a standard error of 0.016.
    assert at[8] < 0.35 and v["threshold"] < max(at.values()) <= v["baseline_local"] + 0.05
    assert 8 < v["d90_low"] < v["d90"] < v["parameters"] == 64 * 24 + 24 + 24 * 10 + 10
    assert v["d90_share"] == v["d90"] / v["parameters"]
    assert v["trainings"] == found.arrays["accuracies"].size == 2 * len(at)
    assert found.converged


def test_the_dimension_and_its_interval_follow_from_the_stored_accuracies(found):
    d, y = (torch.from_numpy(found.arrays[k]) for k in ("dimensions", "accuracies"))
    v = values(found)
    limit = crossing(d, y, v["threshold"])
    assert (v["d90"], v["d90_low"], v["d90_high"]) == (limit.dimension, limit.low, limit.high)
    above = d[d >= v["d90"]][0].item()
    below = d[d < v["d90"]][-1].item()
    assert above <= 1.2 * below + 1  # bisected to the tolerance
    fit = found.arrays["monotone_fit"]
    assert (np.diff(fit) >= 0).all() and fit[-1] >= v["threshold"] > fit[0]


def test_the_curve_holds_the_dimensions_that_all_checkpoints_share(found):
    curve, at = found.curves["accuracy"], means(found)
    assert curve.x.tolist() == [8, 32, 128, 512, found.metrics["parameters"].value]
    assert len(curve.x) < len(at)  # the rest are bisections
    assert curve.y.tolist() == pytest.approx([at[int(d)] for d in curve.x])
    rows = found.arrays["accuracies"][:, found.arrays["dimensions"] == 8]
    assert curve.error is not None
    assert curve.error[0] == pytest.approx(abs(rows[0, 0] - rows[1, 0]) / 2)  # (a−b)/√2 over √2
    assert not {curve.x_name, "accuracy"} & set(found.metrics)  # they are one name space in MLflow


def test_the_subspace_checkpoint_can_be_rebuilt_and_has_its_accuracy(net, found):
    z, seed = found.arrays["z"], int(found.arrays["z_seed"])
    assert len(z) == min(d for d in means(found) if d >= values(found)["d90"])
    p = make_projection("fastfood", len(net.start), len(z), generator(seed))
    theta = net.start + p.expand(torch.from_numpy(z))
    stored = found.arrays["theta_subspace"]
    assert np.array_equal(theta.numpy(), stored) and stored.dtype == np.float32
    column = found.arrays["dimensions"] == len(z)
    best = found.arrays["accuracies"][:, column].max()
    assert 1 - net.validation.evaluate(theta).error == pytest.approx(best, abs=1e-12)


def test_a_search_that_does_not_reach_says_so(net):
    result = measure(net, largest=20)
    assert list(means(result)) == [8, 20] and result.curves["accuracy"].x.tolist() == [8, 20]
    assert math.isinf(values(result)["d90"]) and math.isinf(values(result)["d90_high"])
    assert not result.converged
    assert any("not reached up to d=20" in note for note in result.notes)
    assert len(result.arrays["z"]) == 20
    draw(result, "t").draw_without_rendering()


def test_a_limit_beyond_the_parameters_is_the_parameters(net):
    result = measure(net, baseline=1.0, share=1.0, epochs=1, subspaces=1, largest=10**6)
    assert max(means(result)) == 64 * 24 + 24 + 24 * 10 + 10


def test_accuracy_that_falls_with_the_dimension_is_said():
    tried, y = torch.tensor([8, 32, 128]), torch.tensor([[0.2, 0.71, 0.6], [0.2, 0.69, 0.64]])
    (note,) = _falling(tried, y)
    assert "falls by 0.08 towards d=128" in note
    assert not _falling(tried[:2], y[:, :2])
    assert not _falling(tried, y + torch.tensor([0, 0, 0.05]))  # by 0.03: noise


# --- what a checkpoint and a baseline change ------------------------------------------------------


def test_checkpoints_of_one_start_share_the_accuracies(net, found):
    result = measure(net, net.worse)
    assert values(result)["baseline_local"] < values(found)["baseline_local"] - 0.05
    assert values(result)["d90"] < values(found)["d90"]
    one, other = means(result), means(found)
    common = one.keys() & other.keys()
    assert len(common) >= 3 and list(one) != list(other)
    assert {d: one[d] for d in common} == {d: other[d] for d in common}
    assert any("share the accuracy at every d" in note for note in result.notes)


def test_a_global_baseline_decides_instead_of_the_checkpoints(net, found):
    result = measure(net, net.worse, baseline=0.5)
    v = values(result)
    assert v["baseline_global"] == 0.5 and v["threshold"] == pytest.approx(0.45)
    assert v["baseline_local"] == 1 - net.validation.evaluate(net.worse).error
    assert v["d90"] < values(found)["d90"]
    assert "global baseline: accuracy 0.5, given by the user" in result.notes[0]
    assert "baseline_global" not in found.metrics
    assert "local baseline" in found.notes[0] and "the checkpoint's own" in found.notes[0]


def test_a_start_that_is_good_already_is_said(net):
    result = measure(net, start=net.theta, subspaces=1, epochs=1, d=4, lr=1e-6)
    assert any("the start reaches the threshold untrained" in note for note in result.notes)
    assert values(result)["share_of_baseline"] == pytest.approx(1, abs=0.01)


# --- one dimension --------------------------------------------------------------------------------


def test_one_dimension_gives_the_searchs_accuracy_and_no_d90(net, found):
    result = measure(net, d=32)
    accuracy, row = result.metrics["accuracy_at_d"], result.arrays["accuracies"][:, 0]
    assert np.array_equal(
        row, found.arrays["accuracies"][:, found.arrays["dimensions"] == 32][:, 0]
    )
    p = accuracy.value
    assert p == pytest.approx(row.mean())
    assert accuracy.errors == {
        "subspaces": pytest.approx(abs(row[0] - row[1]) / 2),
        "data": pytest.approx(math.sqrt(p * (1 - p) / 360)),
    }
    v = values(result)
    assert v["share_of_baseline"] == pytest.approx(p / v["baseline_local"])
    assert "d90" not in v and not result.curves and result.converged
    assert len(result.arrays["z"]) == 32


def test_all_dimensions_train_like_the_network_itself(net):
    D = len(net.start)
    result = measure(net, d=D, kind="dense", subspaces=1, epochs=8)
    assert values(result)["share_of_baseline"] > 0.97
    assert "subspaces" not in result.metrics["accuracy_at_d"].errors


def test_diverged_trainings_count_as_chance_and_are_said(net):
    result = measure(net, d=4, lr=1e30)
    assert result.arrays["accuracies"].tolist() == [[0.1], [0.1]]
    assert any("2 of 2 trainings diverged and count as chance level 0.1" in n for n in result.notes)
    assert np.isnan(result.arrays["z"]).any()  # nan stays nan
    assert values(measure(net, d=4))["accuracy_at_d"] != 0.1


# --- the caller's things, progress, figures -------------------------------------------------------


def test_the_seed_decides_and_the_caller_keeps_what_is_his(net):
    model = net.training.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    points = net.theta.clone(), net.start.clone()
    one, two, other = (measure(net, d=9, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.arrays["theta_subspace"], two.arrays["theta_subspace"])
    assert not np.array_equal(one.arrays["z"], other.arrays["z"])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(net.theta, points[0]) and torch.equal(net.start, points[1])
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_progress_never_falls_and_never_passes_its_total(net):
    told: list[tuple] = []
    measure(net, epochs=1, largest=200, report=lambda *a: told.append(a))
    done = [a for a, _, _ in told]
    assert done == sorted(done) and len(set(done)) == len(done)
    assert all(a <= b for a, b, _ in told)
    assert told[0][2] == "d=8, subspace 1/2"
    # A single training is known to the last batch: 600 images in 19 batches, 2 subspaces.
    told.clear()
    measure(net, epochs=1, d=4, report=lambda *a: told.append(a))
    assert told[-1][:2] == (38, 38)
    _part(lambda *a: told.append(a), 5, 3, "longer than expected")(1, 10)
    assert told[-1] == (51, 60, "longer than expected")


def test_the_figure_says_the_dimension_and_the_baseline(net, found):
    (plot,) = draw(found, "t").axes
    labels = plot.get_legend_handles_labels()[1]
    v = values(found)
    assert any(
        label.startswith(f"d90 = {v['d90']:.0f} (95 %: {v['d90_low']:.0f}") for label in labels
    )
    texts = [text.get_text() for text in plot.texts]
    assert texts[0] == f"local baseline {v['baseline_local']:.3f}"
    assert texts[1] == f"0.9 × baseline = {v['threshold']:.3f}"
    single = measure(net, d=8, subspaces=1, epochs=1, baseline=0.8, share=1.0)
    (plot,) = draw(single, "t").axes
    assert [text.get_text() for text in plot.texts] == ["global baseline 0.800"]
    assert plot.get_legend_handles_labels()[1] == ["one subspace"]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 10**6}, "d=1000000 is outside"),
        ({"d": -1}, "d=-1 is outside"),
        ({"share": 0.0}, "share=0 is outside"),
        ({"share": 1.1}, "share=1.1 is outside"),
        ({"share": math.nan}, "share=nan is outside"),
        ({"baseline": 90.0}, "baseline=90 is no accuracy"),
        ({"kind": "hadamard"}, "unknown projection 'hadamard'"),
    ],
)
def test_bad_options_are_refused(net, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(net, **options)


def test_a_task_without_classes_is_refused(net):
    model = torch.nn.utils.skip_init(torch.nn.Linear, 3, 1)
    model.weight.data.zero_()
    model.bias.data.zero_()
    regression = Landscape(model, torch.zeros(4, 3), torch.zeros(4, 1), F.mse_loss)
    theta = flatten(model)
    with pytest.raises(InputError, match="use a classifier"):
        intrinsic_dim(regression, regression, theta, theta, generator(), lambda *_: None)


def test_the_forecast_holds_between_the_shortest_search_and_the_longest() -> None:
    declared = find("intrinsic_dim")
    assert declared.work is not None
    tolerance = declared.options["tolerance"].default
    for parameters, largest in ((182_570, 10_000), (182_570, 100), (50, 10_000), (5, 5)):
        sizes = Sizes(parameters, 256, 1000, 200, (), "")
        options = {name: option.default for name, option in declared.options.items()}
        work = declared.work(sizes, **options | {"largest": largest})
        most = work.gradients / (options["subspaces"] * options["epochs"] * sizes.training)
        end = min(largest, parameters)
        lengths = [
            len(search(lambda d, at=at: [float(d >= at)], 0.5, end, smallest=8, ratio=4,
                       tolerance=tolerance)[0])
            for at in range(1, end + 2, 1 + end // 500)
        ]  # fmt: skip
        assert work.least and work.most and work.most.gradients == work.gradients
        assert max(lengths) <= most + 1
        assert min(lengths) >= work.least.gradients / work.gradients * most - 1e-9
