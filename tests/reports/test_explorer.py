"""The explorer's content: the report's numbers, at every checkpoint and between any two."""

from __future__ import annotations

import base64
import gzip
import json
import re

import mlflow
import numpy as np
import pytest
import synthetic
from conftest import copy_store

from lsa.cli import app
from lsa.figures import explorer as figures
from lsa.probe import Curve, Result
from lsa.reports import explorer, tables
from lsa.reports.measurements import measured
from lsa.runtime.errors import InputError
from lsa.tracking import runs

SGD = ("train", "sgd")
pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


@pytest.fixture(scope="module")
def studied_once(made_once):
    return made_once(synthetic.studied)


@pytest.fixture
def setting(workplace, studied_once):
    source, made = studied_once
    copy_store(source, workplace)
    return made


def unpacked(page: str, name: str) -> str:
    (packed,) = re.findall(rf'<script type="text/plain" id="{name}">(.*?)</script>', page)
    return gzip.decompress(base64.b64decode(packed)).decode()


def test_numbers_errors_and_doubts_are_the_reports(setting):
    (neb, *_) = (m for m in measured(setting) if m.step == "auto_neb" and m.seed == 1)
    mlflow.tracking.MlflowClient().log_metric(neb.done.run_id, "auto_neb/converged", 0.0)
    found, everything = explorer.content(setting), measured(setting)
    last = {(p["optimizer"], p["seed"]): p for p in found["points"] if p["last"]}
    assert len(last) == 6
    for m in everything:
        if (m.subject, m.seed) in last and not m.step.startswith("trajectory"):
            shown = last[m.subject, m.seed]["numbers"]
            for name in tables.headline([m]):
                if name in m.numbers:
                    assert shown[name][3] == tables.cell([m], name).replace("\n", "; ")
    sgd = last["sgd", 0]["numbers"]["lanczos/lambda_max"]
    (run,) = (m for m in everything if (m.step, m.subject, m.seed) == ("lanczos", "sgd", 0))
    value, error = (run.numbers[f"lanczos/lambda_max{part}"] for part in ("", "_se_data"))
    assert sgd[:3] == pytest.approx([value, value - 2 * error, value + 2 * error], rel=1e-5)
    a, b = neb.subject.split(" – ")
    (edge,) = (
        e for e in found["edges"]
        if [(found["points"][e[k]]["optimizer"], found["points"][e[k]]["seed"]) for k in "ab"]
        == [(a, 1), (b, 1)]
    )  # fmt: skip
    assert "auto_neb: not converged" in edge["doubts"]
    assert [text.endswith("; not converged") for _, text in edge["numbers"]] == [0, 0, 0, 1, 1]
    assert [way["doubt"] for way in edge["ways"]] == ["", "", "not converged"]
    assert last[a, 1]["numbers"]["auto_neb/path_loss"][3].count("not converged") <= 1
    json.dumps(found, allow_nan=False)


def test_a_training_is_a_way_of_checkpoints_with_what_was_measured_at_each(setting):
    points = explorer.content(setting)["points"]
    own = [p for p in points if (p["optimizer"], p["seed"]) == ("adamw", 1)]
    assert [p["epoch"] for p in own] == list(range(1, synthetic.EPOCHS + 1))
    assert [p["last"] for p in own] == [False] * (synthetic.EPOCHS - 1) + [True]
    losses = [p["numbers"]["final/train_loss"][0] for p in own]
    sharpness = [p["numbers"]["lanczos/lambda_max"][0] for p in own]
    assert losses == sorted(losses, reverse=True)
    assert sharpness == sorted(sharpness, reverse=True)
    assert (
        "sgd_noise/lambda_h" not in own[0]["numbers"] and own[-1]["numbers"]["sgd_noise/lambda_h"]
    )


def test_what_lies_between_two_seeds_is_shown_as_well(setting):
    before = len(explorer.content(setting)["edges"])
    assert before == 6
    of = {
        m.seed: m.done.run_id for m in measured(setting) if m.step == "train" and m.subject == "sgd"
    }
    store = synthetic.Store("made")
    store.trained = {("sgd", 0): of[0], ("twin", 0): of[1]}
    curve = Curve(np.array([0.0, 1.0]), np.array([0.1, 0.2]), "alpha")
    store.probe("interpolation", ("sgd", "twin"), 0, Result({}, {"train_loss": curve}))
    found = explorer.content(setting)
    assert len(found["edges"]) == before + 1
    ends = [found["points"][found["edges"][-1][k]] for k in "ab"]  # the oldest first
    assert [(p["optimizer"], p["seed"]) for p in ends] == [("sgd", 0), ("sgd", 1)]


def test_a_hostile_store_adds_no_markup_and_the_page_asks_nobody(setting):
    hostile = "</script><img src=x onerror=alert(1)>"
    client = mlflow.tracking.MlflowClient()
    for m in measured(setting):
        client.set_tag(m.done.run_id, "lsa.note.0", hostile)
        client.log_metric(m.done.run_id, "final/odd", 1.0)
    page = explorer.page(setting)
    assert page.count("</script>") == 3 and "<img" not in page
    assert hostile in unpacked(page, "data") and "plotly.js" in unpacked(page, "library")[:200]
    assert not re.search(
        r"(src|href)=|@import|url\(", page
    )  # but for what the text of a table links
    assert len(page) < 2_500_000


def test_an_artifact_that_lsa_did_not_write_is_one_plain_line(setting):
    (run, *_) = (m for m in measured(setting) if m.step == "interpolation")
    artifact = runs.folder(run.done) / "interpolation.json"
    artifact.write_text('{"curves": {"train_loss": {"x_name": "a", "x": [0], "y": []}}}')
    with pytest.raises(InputError, match="is none that lsa wrote"):
        explorer.content(setting)


def test_the_command_writes_one_file_and_prints_its_path(setting, workplace, capsys):
    assert app.run(["explore", "made"]) == 0
    path = workplace / capsys.readouterr().out.strip()
    assert path.name == "explorer-made.html" and path.read_text() == explorer.page(setting)
    assert app.run(["explore", "made", "--out", "nowhere"]) == 2
    assert app.run(["explore", "tiny"]) == 2  # nothing measured
    assert "nothing of project tiny is measured" in capsys.readouterr().err


def test_numbers_that_json_does_not_have_are_null():
    assert figures.numbers([1.23456789, float("nan")]) == [1.235, None]
    assert figures.number(float("inf")) is None and figures.number(1.23456789) == 1.23457
