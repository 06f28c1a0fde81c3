"""The report of a real study, rebuilt from its store."""

from __future__ import annotations

import json

import mlflow
import pytest

from lsa import cli, plan, project, study
from lsa.checks import checks
from lsa.measurements import Measurement, measured, written
from lsa.report import report
from lsa.tracking import Done, shown

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


@pytest.fixture
def studied(workplace):
    file = workplace / "projects" / "tiny.yaml"
    text = file.read_text().replace("{lanczos: {k: 2}}", "{lanczos: {k: 2, density_steps: 9}}")
    file.write_text(text + "pairs: {interpolation: {points: 5}}\n")
    setting = project.load("tiny")
    with study(setting) as running:
        plan.run(setting, running)
    return setting


def test_the_report_holds_every_number_of_the_study(studied, workplace, capsys):
    found = report(studied)
    for m in measured(studied):
        assert m.done.run_id in found.html and m.done.run_id in found.markdown
    sgd = next(m for m in found.content["measurements"] if m["step"] == "lanczos")
    value = sgd["numbers"]["lanczos/lambda_max"]
    assert f"{value:.4g} ± " in found.html
    assert "sgd – adamw" in found.markdown and "the project has 1" in found.markdown
    assert found.html.count("data:image/png;base64,") == 2  # density, interpolation
    assert "http" not in found.html.replace("https", "http").partition("<style>")[0]
    json.dumps(found.content, allow_nan=False)

    assert cli.run(["report", "tiny"]) == 0
    assert (workplace / "report-tiny.html").read_text() == found.html
    run_id = capsys.readouterr().out.split()[-1]
    stored = mlflow.artifacts.load_text(f"runs:/{run_id}/report.html")
    assert stored == found.html
    assert cli.run(["report", "tiny", "--out", "nowhere"]) == 2


def test_a_study_logs_its_report(studied):
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    (of_study,) = [run for run in runs if run.data.tags.get("lsa.step") == "study"]
    assert "lanczos" in mlflow.artifacts.load_text(f"runs:/{of_study.info.run_id}/report.html")


def test_text_from_the_store_cannot_become_markup(studied):
    client = mlflow.MlflowClient()
    victim = measured(studied)[0].done.run_id
    client.set_tag(victim, "lsa.version.torch", "<script>alert(1)</script>")
    page = report(studied).html
    assert "<script>" not in page and "&lt;script&gt;" in page


def numbers(step: str, values: dict[str, float]) -> Measurement:
    return Measurement(step, "sgd", 0, Done("id", values, {"n_samples": "64"}, {}))


def test_numbers_that_must_agree_and_do_not_are_flagged():
    spectrum = numbers("lanczos", {"lanczos/lambda_max": 10.0})
    good = numbers("perturbation", {"perturbation/curvature_fit": 10.05})
    bad = numbers("perturbation", {"perturbation/curvature_fit": 10.2})
    assert [check.holds for check in checks([spectrum, good])] == [True]
    assert [check.holds for check in checks([spectrum, bad])] == [False]
    path = {"auto_neb/path_loss": 3.0, "auto_neb/log_classes": 2.303, "auto_neb/linear_max": 4.0}
    above = numbers("auto_neb", path | {"auto_neb/bound_margin": -0.7})
    assert [check.holds for check in checks([above])] == [False, True]


def test_numbers_are_written_with_their_errors():
    one = {"a": 1.0, "a_se_data": 0.1, "b": 7.0, "b_low": 5.0, "b_high": float("inf")}
    assert written([one], "a") == "1 ± 0.2" and written([one], "b") == "7 (5 … inf)"
    assert written([one], "c") == "–"
    assert written([{"a": 1.0}, {"a": 3.0}], "a") == "2 ± 13"  # t of one degree of freedom: 12.7


def test_a_password_in_the_stores_address_is_not_shown():
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert shown("sqlite:///a/b.db") == "sqlite:///a/b.db"
