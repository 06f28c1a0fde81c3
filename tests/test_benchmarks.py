"""The benchmarks judge before they compare, and their tables hold what they say."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import forked
from torch import nn

from benchmarks import (
    __main__,
    density,
    eigenvalues,
    gpt,
    language,
    language_eigenvalues,
    paths,
    summary,
    watch,
    watch_oracles,
)
from benchmarks.watched_trainings import excess
from benchmarks.within import within
from lsa.maths.spectra.quadrature import Quadrature

ROOT = Path(__file__).parents[1]


def test_only_who_missed_no_eigenvalue_is_accurate(monkeypatch):
    """All residuals are met; what leaves out the third largest has other eigenvalues."""
    values = torch.tensor([5.0, 4.0, 3.0, 2.0])
    vectors = torch.eye(4)

    def contestant(*places: int):
        chosen = torch.tensor(places)
        return lambda *_, **__: (values[chosen], vectors[:, chosen])

    class At:
        def hessian(self, _theta):
            return lambda v: values * v

    monkeypatch.setattr(eigenvalues.setting, "landscape", lambda *_: (At(), torch.zeros(4)))
    monkeypatch.setattr(eigenvalues, "lsa", contestant(0, 1, 2))
    rivals = {"whole": contestant(0, 1, 2), "gap": contestant(0, 1, 3)}
    monkeypatch.setattr(eigenvalues, "RIVALS", rivals)
    x = torch.zeros(1)
    found = eigenvalues.rows(nn.Linear(1, 1), x, x, ["whole", "gap"])
    judged = {row["library"]: row["accurate"] for row in found}
    assert judged["lsa"] and judged["whole"] and not judged["gap"]
    lines = summary.headlines({"eigenvalues": found})
    assert {line["figure"] for line in lines} == {"time of whole / ours"}


def test_errors_of_a_trace_count_in_the_time_of_a_density(monkeypatch):
    """Nodes and weights of equal rules: the error of each is Hutchinson's, 2 tr A² over n."""
    nodes, weights = torch.tensor([[1.0, 3.0]] * 4), torch.tensor([[0.75, 0.25]] * 4)

    def rule(*_, pairs: int = 0):
        whole = Quadrature(8, nodes.double(), weights.double(), 8)
        if not pairs:
            return whole
        shares = torch.full((4, 1), 2.0, dtype=torch.float64)
        return Quadrature(
            8, whole.nodes, whole.weights, 8, torch.tensor([3.0], dtype=torch.float64), shares
        )

    methods = {
        "lsa": rule,
        "lsa, eigenpairs first": lambda *at: rule(*at, pairs=1),
        "eigenthings": rule,
    }
    monkeypatch.setattr(density, "METHODS", methods)
    found = density.rows(nn.Linear(1, 1), nodes, nodes, ["eigenthings"])
    square = (2 * 8 * (0.75 + 0.25 * 9) / 4, 2 * (8 * (0.75 + 0.25 * 9) - 2 * 9) / 4)
    assert [row["its error"] ** 2 for row in found] == pytest.approx([*square, square[0]])
    timed = [{**row, "seconds": s} for row, s in zip(found, (1.0, 3.0, 2.0), strict=True)]
    plain, equal = summary.headlines({"density": timed})
    assert plain["value"] == pytest.approx(2)
    assert equal["value"] == pytest.approx(2 * square[0] / (3 * square[1]))


@pytest.mark.full
def test_paths_are_judged_alike_and_spend_what_they_say(monkeypatch):
    monkeypatch.setattr(paths, "SCHEDULES", ((1, 0.1),))
    x = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    line, ours, theirs = paths.rows("mlp", x, torch.arange(48) % 10, hidden=[8])
    assert line["gradients"] == 0 and line["pivots"] == 2
    assert ours["highest loss"] <= line["highest loss"] + 1e-6
    assert theirs["gradients"] == pytest.approx(ours["gradients"], rel=0.3)
    assert "diverged" not in theirs["search"] and theirs["above the higher end"] > -1e-6


@pytest.mark.parametrize("module", ["benchmarks", "benchmarks.overhead"])
def test_every_command_says_what_it_takes(module):
    code = f"import runpy; runpy.run_module('{module}', run_name='__main__', alter_sys=True)"
    found = forked("--help", code=code, cwd=ROOT)
    assert found.returncode == 0 and f"python -m {module}" in found.stdout


@pytest.mark.full
def test_the_command_writes_tables_and_a_figure(tmp_path):
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks", "--samples", "32", "--rivals", ""]
    command += ["--only", "products,noise,line,modes", "--out", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = page.read_text()
    assert text.count("## ") == 4 and "| gradient |" in text and "page.png" in text
    assert page.with_suffix(".png").stat().st_size > 1000


def test_a_library_that_fails_or_is_late_is_a_row(monkeypatch):
    """The three largest eigenvalues of a tiny GPT: one that finds them, one late, one broken."""
    shape = gpt.Shape(1, 8, 2, 6, 16)
    monkeypatch.setitem(gpt.SHAPES, "tiny", shape)
    at = language.setting(language.Case("tiny", 2, 6), "cpu", steps=0)

    def late(*_):
        with within(0.05):
            time.sleep(60)

    def broken(*_):
        raise RuntimeError("no derivative")

    rivals = {"late": late, "broken": broken, "absent": lambda *_: __import__("no_such_module")}
    monkeypatch.setattr(language_eigenvalues, "RIVALS", rivals)
    found = list(language_eigenvalues.rows(at, list(rivals), 60.0, math.inf))
    by = {(row["library"], row["tolerance"]): row for row in found}
    for ours in ("lsa, exact", language_eigenvalues.UNCONFIRMED, "lsa, from gradients"):
        assert by[ours, 1e-3]["accurate"] and by[ours, 1e-3]["residual"] <= 2e-3
    assert by["late", 1e-2]["eigenvalues"] == "fails: over 0 s" and ("late", 1e-3) not in by
    assert by["broken", 1e-3]["eigenvalues"] == "fails: no derivative"
    assert "no_such_module" in by["absent", 1e-3]["eigenvalues"]


@pytest.mark.full
def test_products_of_language_models_are_measured_against_a_gradient(monkeypatch):
    monkeypatch.setitem(gpt.SHAPES, "tiny", gpt.Shape(1, 8, 2, 6, 16))
    case = language.Case("tiny", 2, 6)
    rows = list(language.products(case, "cpu"))
    assert [row["what"] for row in rows] == list(language.WAYS)
    assert rows[0]["gradients"] == 1 and all(row["gradients"] > 0 for row in rows)
    memory = rows[0]["MB"]  # none where it fits into what the process holds already
    for row in rows:
        ratio = row["MB"] / memory if memory else math.nan
        assert row["of a gradient's"] == pytest.approx(ratio, nan_ok=True)
    grown = list(language.growth([case], "cpu", math.inf))
    assert {row["grows"] for row in grown} == {"context", "sequences"}
    assert [row["size"] for row in grown[::4]] == [3, 6, 12, 24, 1, 2, 4, 8]


@pytest.mark.full
def test_the_benchmark_of_watching_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(watch, "ROUNDS", {"mlp": 1})
    monkeypatch.setattr(__main__.heap, "keep", lambda: None)
    page = tmp_path / "watch.md"
    options = ["--only", "watch", "--networks", "mlp", "--rivals", "", "--out", str(page)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
    __main__.main()
    text = page.read_text()
    for way in ("bare", "norms, every step", "update", "noise_of_samples", "sharpness", "cockpit"):
        assert f"| {way}" in text
    assert "| mlp | sharpness |" in capsys.readouterr().out


@pytest.mark.full
def test_the_numbers_of_a_watch_are_compared_with_oracles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch_oracles, "STEPS", 3)
    errors: watch_oracles.Errors = {}
    inside: dict[str, list[bool]] = {}
    watch_oracles.of_training(watch_oracles.networks()["cnn"], "adamw", errors, inside)
    rows = watch_oracles.rows(errors, inside)
    assert [row["comparisons"] for row in rows] == [3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1]
    assert {row["within its residual"] for row in rows} == {"", "1 of 1"}
    assert abs(errors["lambda_max"][0]) < 0.01 and abs(errors["directional_sharpness"][0]) < 0.05


def test_the_excess_of_a_watched_training():
    """A hundredth in every step, two steps more in each hundredth one; a machine that is busy."""
    rng = torch.Generator().manual_seed(0)
    moods = 1 + 0.3 * torch.rand(2, 1, 20_000, generator=rng, dtype=torch.float64) ** 3
    own = torch.zeros(1, 20_000, dtype=torch.float64)
    own[:, ::100] = 2.0
    watched = moods[0] * 1.01 + own
    assert float(excess(watched, own, moods[1])) == pytest.approx(0.03, abs=0.003)
    assert float(excess(moods[0], 0 * own, moods[1])) == pytest.approx(0.0, abs=0.003)
    always = torch.full_like(own, 0.5)
    assert float(excess(1.5 * moods[0], always, moods[1])) == pytest.approx(0.5, abs=0.005)
