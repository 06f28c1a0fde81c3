"""What every probe keeps, whoever wrote it: one run of each on a small trained network."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pytest
import torch

from lsa import probe
from lsa.figures import draw
from lsa.landscape import Landscape, flatten
from lsa.landscape.sharded import shared
from lsa.project import resolve
from lsa.training import data, models, stability

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

PAGES = Path(__file__).parents[2] / "docs" / "probes"
# Smaller than the defaults, so that each takes about a second.
SMALL: dict[str, dict[str, Any]] = {
    "lanczos": {"density_probes": 2, "density_steps": 15},
    "sgd_noise": {"k": 2, "probes": 2},
    "perturbation": {"points": 9},
    "sharpness": {"probes": 2, "starts": 2, "m": 50},
    "layers": {"probes": 2},
    "surface": {"points": 5},
    "symmetry_audit": {"probes": 2},
    "interpolation": {"points": 9},
    "auto_neb": {"curve_steps": 10, "cycles": 1, "steps": 3},
    "intrinsic_dim": {"d": 5, "subspaces": 2, "epochs": 1},
}


@pytest.fixture(scope="module", name="inputs")
def _inputs() -> dict[str, Any]:
    return inputs()


def inputs(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    network: str = "mlp",
    rates: tuple[float, float] = (0.5, 0.1),
    **shape: Any,
) -> dict[str, Any]:
    """Everything that a probe may ask for, by its reserved name."""
    split = data.load("digits", train_limit=200, val_limit=80, device=device)
    shape = shape or {"hidden": [12]}
    model = models.build(network, input_shape=(1, 8, 8), classes=10, seed=0, **shape)
    model.to(device, dtype)
    training = shared(Landscape(model, split.x_train.to(dtype), split.y_train))
    start = flatten(model)

    def descend(lr: float) -> torch.Tensor:
        theta = start
        for _ in range(60):
            theta = theta - lr * training.gradient(theta)
        return theta

    return {
        "training": training,
        "landscape": training.subset(torch.arange(100)),
        "validation": training.with_data(split.x_val.to(dtype), split.y_val),
        "theta": descend(rates[0]),
        "theta_b": descend(rates[1]),
        "theta_init": start,
        "optimizer": stepped(start, training),
        "others": {},
        "trajectory": dict,
        "memory": {},
        "report": lambda done, total, text="": None,
    }


def stepped(theta: torch.Tensor, landscape: Landscape) -> stability.OptimizerState:
    """Adam after two steps on θ, flat."""
    moved = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.Adam([moved])
    for _ in range(2):
        moved.grad = landscape.gradient(moved.detach())
        optimizer.step()
    return stability.read(optimizer, [moved], 40)


def run(name: str, inputs: dict[str, Any], seed: int = 0) -> probe.Result:
    declared = probe.find(name)
    options = resolve(declared, SMALL.get(name, {}), "test")
    given = inputs | {"rng": torch.Generator().manual_seed(seed)}
    return declared.function(*(given[key] for key in declared.inputs), **options)


def frozen(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Copies of all that a probe must not change."""
    thetas = [inputs[name].clone() for name in ("theta", "theta_b", "theta_init")]
    (moments,) = inputs["optimizer"].optimizer.state.values()
    thetas += [value.clone() for value in moments.values()]
    for name in ("training", "landscape", "validation"):
        place = inputs[name]
        thetas += [t.clone() for t in (*place.model.state_dict().values(), place.x, place.y)]
        thetas.append(torch.tensor([module.training for module in place.model.modules()]))
    return thetas


@pytest.mark.parametrize("name", sorted(probe.modules()))
def test_a_probe_keeps_the_contract(name, inputs):
    before = frozen(inputs)
    result = run(name, inputs)
    assert all(map(torch.equal, before, frozen(inputs))), "an input was changed"

    again = run(name, inputs)
    assert json.dumps(result.to_dict()) == json.dumps(again.to_dict()), "not reproducible"
    for key, values in result.arrays.items():
        np.testing.assert_array_equal(values, again.arrays[key])  # nan equals nan, and text too
        assert values.dtype != object

    missing = set(probe.find(name).headline) - set(result.metrics)
    assert not missing or result.notes, f"no {missing}, and no word about it"
    axes = {curve.x_name for curve in result.curves.values()}
    names = [*result.metrics, *result.curves, *axes]
    assert len(names) == len(set(names)), "a curve would overwrite a metric"
    assert not any("_se_" in key or "/" in key for key in names)
    for curve in result.curves.values():
        assert curve.x.ndim == 1 and curve.x.shape == curve.y.shape
        assert curve.error is None or curve.error.shape == curve.x.shape
    for metric in result.metrics.values():
        assert all(error >= 0 or np.isnan(error) for error in metric.errors.values())
    assert all(note and "\n" not in note for note in result.notes)
    json.dumps(result.to_dict(), allow_nan=False)

    if probe.modules()[name].startswith("lsa.probes."):
        documented(name, result)
    drawn = draw.figures(name, result, "title")
    assert drawn and all(figure.axes for figure in drawn.values())
    for figure in drawn.values():
        figure.canvas.draw()


def documented(name: str, result: probe.Result) -> None:
    """Every number stands in the probe's page with its unit and the sources of its errors."""
    page = (PAGES / f"{name}.md").read_text().split("\n## Metrics\n")[1]
    written = {}
    for line in re.findall(r"^\| `.*$", page, re.MULTILINE):
        names, unit, sources, _ = re.split(r"(?<!\\)\|", line)[1:-1]
        for key in re.findall(r"`(\w+)`", names):
            written[key] = unit.strip(), set(sources.replace("–", "").replace(",", " ").split())
    for key, metric in result.metrics.items():
        assert written[key] == (metric.unit, set(metric.errors)), key
    reported(name, written, result)


def reported(name: str, written: Collection[str], result: probe.Result) -> None:
    """What it declares to the report is there: a wrong name would be passed over in silence."""
    declared = probe.find(name)
    named = [*declared.compare, *declared.during]
    for check in declared.check:
        if isinstance(check, probe.Same):
            step, _, other = check.other.partition("/")
            assert f"`{other}`" in (PAGES / f"{step}.md").read_text(), check
            named.append(check.metric)
        else:
            named += [side for side in (check.low, check.high) if isinstance(side, str)]
            named += [part[1] for part in Formatter().parse(check.text) if part[1]]
    assert set(named) <= set(written)
    assert {*declared.between, declared.curve} - {""} <= set(result.curves)


def test_the_registry_has_the_six_probes():
    six = {"lanczos", "sgd_noise", "perturbation", "intrinsic_dim", "interpolation", "auto_neb"}
    assert six <= set(probe.modules())
