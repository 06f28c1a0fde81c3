"""Results: looked up, compared, kept in a file, shown; and probes called by their names."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lsa
from lsa.landscape import flatten
from lsa.probe import Curve, Metric, Result
from lsa.runtime.errors import InputError

RESULT = Result(
    {"a": Metric(1.5, "loss", {"data": 0.1, "probes": math.inf}), "b": Metric(math.nan)},
    {"line": Curve(np.arange(3.0), np.array([1.0, math.inf, 2.0]), "step", np.ones(3), "s", "m")},
    {"vectors": np.eye(2), "file.names": np.array(["x", "yy"])},
    converged=False,
    notes=("a note",),
    probe="lanczos",
    run_id="r1",
    checkpoint="models:/m/1",
)


def test_a_metric_is_looked_up_by_its_name_and_a_near_one_is_offered():
    assert RESULT["a"].value == 1.5
    assert "a" in RESULT and "aa" not in RESULT
    with pytest.raises(KeyError, match="no metric 'aa'; did you mean 'a'"):
        RESULT["aa"]


def test_results_are_equal_when_they_hold_the_same_numbers():
    for other in (copy.deepcopy(RESULT), pickle.loads(pickle.dumps(RESULT))):
        assert other == RESULT
    changed = {"vectors": np.eye(2) * 2, "file.names": RESULT.arrays["file.names"]}
    assert RESULT != dataclasses.replace(RESULT, arrays=changed)
    assert RESULT != dataclasses.replace(RESULT, notes=())
    assert RESULT != "lanczos"


def test_curves_are_equal_when_they_hold_the_same_points():
    curve = Curve(np.arange(3.0), np.array([1, math.nan, 2]))
    assert curve == copy.deepcopy(curve) != dataclasses.replace(curve, y=np.arange(3.0))
    assert curve != dataclasses.replace(curve, error=curve.x) and curve != "a curve"
    with pytest.raises(TypeError, match="unhashable"):
        hash(curve)


def test_a_printed_result_is_a_line_per_number_and_note_and_no_arrays():
    metrics = {
        "lambda_max": Metric(11.27291, "loss", {"data": 2.81, "probes": 0.1}),
        "n": Metric(512.0),
    }
    arrays = {"eigenvectors": np.zeros((3, 4))}
    result = Result(metrics, arrays=arrays, converged=False, notes=("one note",), probe="lanczos")
    assert str(result).splitlines() == [
        "lanczos: not converged",
        "lambda_max  11.2729 loss  standard error 2.8 (data), 0.1 (probes)",
        "n           512",
        "note: one note",
    ]
    assert str(Result({})) == "result: converged"


def test_a_saved_result_comes_back_whole(tmp_path: Path):
    RESULT.save(tmp_path / "result.npz")
    back = Result.load(tmp_path / "result.npz")
    assert back == RESULT and back.curves["line"].error is not None
    assert json.dumps(RESULT.to_dict(), allow_nan=False) == json.dumps(back.to_dict())


@pytest.mark.parametrize("content", [None, b"", b"PK nonsense", "other arrays"])
def test_a_file_that_holds_no_result_is_refused_in_one_line(tmp_path: Path, content):
    path = tmp_path / "x.npz"
    if content == "other arrays":
        np.savez(path, a=np.ones(2))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz holds no result .*give a file that Result.save"):
        Result.load(path)


def test_a_frame_has_a_row_per_metric_and_a_column_per_error():
    frame = RESULT.to_frame()
    assert list(frame.index) == ["a", "b"] and frame.loc["a", "value"] == 1.5
    assert frame.loc["a", "se_data"] == 0.1 and math.isnan(frame.loc["b", "se_data"])


@pytest.fixture(scope="module")
def landscape() -> lsa.Landscape:
    torch.manual_seed(0)
    return lsa.Landscape(nn.Linear(3, 2), torch.randn(30, 3), torch.arange(30) % 2)


def test_a_probe_is_called_by_its_name_at_the_models_own_parameters(landscape):
    result = lsa.lanczos(landscape, k=2, density_probes=0)
    given = lsa.lanczos(landscape=landscape, theta=flatten(landscape.model), k=2, density_probes=0)
    assert result == given and result.probe == "lanczos" and not result.run_id
    moved = lsa.lanczos(landscape, landscape.theta + 1, k=2, density_probes=0)
    assert moved["lambda_max"] != result["lambda_max"]


def test_a_probes_random_numbers_have_a_seed(landscape):
    first, again, other = (
        lsa.sgd_noise(landscape, rng_seed=seed)["trace_h"].value for seed in (1, 1, 2)
    )
    assert first == again != other


def test_too_many_inputs_by_position_are_refused(landscape):
    with pytest.raises(InputError, match=r"lanczos takes at most \d inputs by position"):
        lsa.lanczos(landscape, *range(9))


def test_what_there_is_is_listed_and_explained():
    assert {"lanczos", "measure", "Result"} <= set(dir(lsa))
    assert inspect.getdoc(lsa.lanczos).startswith("Hessian eigenvalues")
    assert "k" in inspect.signature(lsa.lanczos).parameters
    with pytest.raises(AttributeError, match="no attribute 'lanczo'"):
        _ = lsa.lanczo
