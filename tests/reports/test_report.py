"""The report of a real study, rebuilt from its store."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import mlflow
import pytest
import synthetic
from conftest import copy_store

from lsa import probe, project, step, study
from lsa.cli import app
from lsa.probe import registry
from lsa.reports.checks import checks
from lsa.reports.measurements import Measurement, measured
from lsa.reports.numbers import written
from lsa.reports.report import report
from lsa.studies import plan
from lsa.tracking.runs import Done
from lsa.tracking.store import shown

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


@pytest.fixture(scope="module")
def studied_once(made_once):
    """A workplace with a finished study, and its project."""

    def make(folder: Path) -> project.Project:
        file = folder / "projects" / "tiny.yaml"
        text = file.read_text().replace("{lanczos: {k: 2}}", "{lanczos: {k: 2, density_steps: 9}}")
        file.write_text(text + "pairs: {interpolation: {points: 5}}\n")
        setting = project.load("tiny")
        with study(setting) as running:
            plan.run(setting, running)
        return setting

    return made_once(make)


@pytest.fixture
def studied(workplace, studied_once):
    source, setting = studied_once
    copy_store(source, workplace)
    return setting


def test_the_report_holds_every_number_of_the_study(studied, workplace, capsys):
    found = report(studied)
    for m in measured(studied):
        assert m.done.run_id in found.html and m.done.run_id in found.markdown
    sgd = next(m for m in found.content["measurements"] if m["step"] == "lanczos")
    value = sgd["numbers"]["lanczos/lambda_max"]
    assert f"{value:.4g}&nbsp;±&nbsp;" in found.html and f"{value:.4g} ± " in found.markdown
    assert (
        "sgd – adamw" in found.markdown and "with fewer than 6 seeds; there is 1." in found.markdown
    )
    assert found.html.count("data:image/png;base64,") == 3  # density, pair, barriers
    # Nothing to load from elsewhere; links lead within the page and to MLflow's UI.
    assert not re.search(r"src='(?!data:)", found.html)
    assert not re.search(r"href='(?!#s|http://127.0.0.1:5000/#/experiments/)", found.html)
    json.dumps(found.content, allow_nan=False)

    assert app.run(["report", "tiny"]) == 0
    assert (workplace / "report-tiny.html").read_text() == found.html
    run_id = capsys.readouterr().out.split()[-1]
    stored = mlflow.artifacts.load_text(f"runs:/{run_id}/report.html")
    assert stored == found.html
    assert app.run(["report", "tiny", "--out", "nowhere"]) == 2


def test_a_study_logs_its_report(studied):
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    (of_study,) = [run for run in runs if run.data.tags.get("lsa.step") == "study"]
    assert "lanczos" in mlflow.artifacts.load_text(f"runs:/{of_study.info.run_id}/report.html")


def test_what_was_tried_by_hand_is_no_part_of_the_comparison(studied):
    before = {m.done.run_id for m in measured(studied)}
    with study("tiny"):
        other = step("train", optimizer="sgd", lr=0.3)
        step("lanczos", other, k=1)
        assert other.run_id not in before
    assert {m.done.run_id for m in measured(studied)} == before
    with study("tiny", name="again"):  # the project's training, another option
        assert step("lanczos", step("train", optimizer="sgd"), k=1).run_id not in before
    assert {m.done.run_id for m in measured(studied)} == before


def test_a_study_of_some_probes_still_tells_of_all_that_the_project_names(studied, capsys):
    with study("tiny", name="by hand"):
        step("lanczos", step("train", optimizer="sgd"), k=1)  # the project says 2
    capsys.readouterr()
    assert app.run(["study", "tiny", "--only", "interpolation"]) == 0
    printed = capsys.readouterr().out
    assert "3 steps: 3 reused" in printed and "\nlanczos" in printed


def test_text_from_the_store_cannot_become_markup(studied):
    client = mlflow.MlflowClient()
    victim = measured(studied)[0].done.run_id
    client.set_tag(victim, "lsa.version.torch", "<script>alert(1)</script>")
    page = report(studied).html
    assert "<script>" not in page and "&lt;script&gt;" in page


@pytest.fixture
def imagined(workplace):
    """A store of known numbers: three optimizers, seven seeds, every probe but two."""
    text = synthetic.PROJECT.replace("SEEDS", str(list(range(7))))
    (workplace / "projects" / "imagined.yaml").write_text(text)
    steps = ("lanczos", "trajectory", "intrinsic_dim", "interpolation", "auto_neb")
    synthetic.study("imagined", range(7), steps=steps)
    return project.load("imagined")


@pytest.mark.slow
def test_a_known_study_is_told_as_it_is(imagined):
    found = report(imagined)
    verdicts = {one["name"]: one["verdict"] for one in found.content["insights"]}
    assert verdicts["Adaptive rates win"] == verdicts["Early convergence"] == "established"
    assert verdicts["Momentum flattens"] == verdicts["Indefinite Hessians"] == "established"
    missing = "cannot be asked of this project: it has no measured λ_C of plain SGD"
    assert verdicts["SGD is noisiest by λ_C"].startswith(missing)
    # λ = c·L^½ with c = 40 of sgd and 20 of heavy, so 2 at equal loss whatever the last epoch says.
    sharp = [f for f in found.content["findings"] if f["metric"] == "lanczos/lambda_max"]
    (pair,) = [f for f in sharp if (f["a"], f["b"]) == ("sgd", "heavy")]
    matched = pair["at_equal_loss"]
    assert matched["low"] < 2 < matched["high"] < pair["low"]
    assert pair["seeds"] == list(range(7)) and "seeds 0–6" in pair["sentence"]
    titles = [one["title"] for one in found.content["figures"]]
    assert titles[0] == "largest curvature λ_max during training (lanczos)"
    assert titles[-1] == "barriers"
    assert found.html.count("data:image/png;base64,") == len(titles) == 5
    order = ["In short", "Figures", "All numbers", "Pairs", "Cross-checks", "Provenance"]
    marks = {"html": ("'>", "</h2>"), "markdown": ("## ", "\n")}
    for kind, (before, after) in marks.items():
        text = getattr(found, kind)
        places = [text.index(f"{before}{heading}{after}") for heading in order]
        assert places == sorted(places)
        assert "median" in text and "(6 of 7 finite)" in text  # a search that ended without d90
    for sentence in (pair["sentence"].partition(" at the last epoch")[0], pair["verdict"]):
        assert sentence in found.html.replace("&nbsp;", " ") and sentence in found.markdown
    assert len(found.html) < 6e5
    assert found.content["established"][0].startswith("Adaptive rates win: ")
    assert found.html.index("Adaptive rates win") < found.html.index("<nav")
    assert "not compared: sgd has the value inf at seed 3" in found.markdown


@pytest.mark.slow
@pytest.mark.parametrize(("optimizers", "seeds"), [(("sgd",), 1), (("sgd", "adamw"), 1)])
def test_a_small_study_is_reported_and_establishes_nothing(workplace, optimizers, seeds):
    text = synthetic.PROJECT.replace("SEEDS", str(list(range(seeds))))
    (workplace / "projects" / "imagined.yaml").write_text(text)
    synthetic.study("imagined", range(seeds), optimizers=optimizers)
    found = report(project.load("imagined"))
    everything = found.content["insights"] + found.content["findings"] + found.content["pairs"]
    assert not any(one["established"] for one in everything)
    limit = "there is 1" if len(optimizers) > 1 else "One optimizer is trained"
    assert limit in found.markdown


def numbers(step: str, values: dict[str, float]) -> Measurement:
    return Measurement(step, "sgd", 0, Done("id", values, {"n_samples": "64"}, {}))


def test_numbers_that_must_agree_and_do_not_are_flagged():
    spectrum = numbers("lanczos", {"lanczos/lambda_max": 10.0})
    good = numbers("perturbation", {"perturbation/curvature_fit": 10.05})
    bad = numbers("perturbation", {"perturbation/curvature_fit": 10.2})
    assert [check.holds for check in checks([spectrum, good])] == [True]
    assert [check.holds for check in checks([spectrum, bad])] == [False]
    density = numbers("lanczos", {"lanczos/trace": 100.0, "lanczos/trace_se_probes": 3.0})
    for trace, holds in ((114.0, True), (115.0, False)):  # t of 19 degrees of freedom: 2.86 · 5
        values = {"layers/trace": trace, "layers/trace_se_probes": 4.0}
        layered = Measurement(
            "layers", "sgd", 0, Done("id", values, {"n_samples": "64", "probes": "20"}, {})
        )
        assert [check.holds for check in checks([density, layered])] == [holds]
    path = {"auto_neb/path_loss": 3.0, "auto_neb/log_classes": 2.303, "auto_neb/linear_max": 4.0}
    above = numbers("auto_neb", path | {"auto_neb/bound_margin": -0.7})
    assert [check.holds for check in checks([above])] == [False, True]


def test_a_probe_of_ones_own_declares_what_the_report_checks(monkeypatch):
    @probe.probe(
        headline=("top",),
        check=(
            probe.Same("λ_max", "top", "lanczos/lambda_max", within=0.1),
            probe.AtMost("top {top:.1f} ≤ 11", "top", 11.0),
            probe.AtMost("top ≤ ceiling", "top", "ceiling"),  # that was not measured
        ),
    )
    def mine(theta) -> probe.Result:
        """Doc."""
        ...

    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("mine", "x", group)])
    spectrum = numbers("lanczos", {"lanczos/lambda_max": 10.0})
    try:
        found = checks([spectrum, numbers("mine", {"mine/top": 11.5})])
    finally:
        del probe.PROBES["mine"]
    assert [(check.text, check.holds) for check in found] == [
        ("λ_max 10 (lanczos) = 11.5 (mine) within 10 %", False),
        ("top 11.5 ≤ 11", False),
    ]


def test_numbers_are_written_with_their_errors():
    one = {"a": 1.0, "a_se_data": 0.1, "b": 7.0, "b_low": 5.0, "b_high": float("inf")}
    assert written([one], "a") == "1 ± 0.2" and written([one], "b") == "7 (5 … ∞)"
    assert written([one], "c") == "–"
    assert written([{"a": 1.0}, {"a": 3.0}], "a") == "2 ± 13"  # t of one degree of freedom: 12.7


def test_a_password_in_the_stores_address_is_not_shown():
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert shown("sqlite:///a/b.db") == "sqlite:///a/b.db"
