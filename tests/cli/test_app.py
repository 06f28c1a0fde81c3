"""The command line: help without heavy imports, errors in one line, MLproject in agreement."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lsa import probe
from lsa.cli import app, mlproject
from lsa.studies import cost

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
ROOT = Path(__file__).parents[2]


def test_help_loads_neither_torch_nor_mlflow():
    code = (
        "import sys; from lsa.cli import app; assert app.run(['--help']) == 0; "
        "print({'torch', 'mlflow', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("set()")
    assert "lanczos" in out.stdout and "study" in out.stdout


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", {"COMP_WORDS": "lsa lanczos --density", "COMP_CWORD": "2"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "lsa lanczos --density"}),
    ],
)
def test_a_shell_completes_the_options_of_a_probe_without_torch(shell, line):
    code = (
        "import sys, atexit; from lsa.cli import app; "
        "atexit.register(lambda: print({'torch', 'mlflow', 'numpy'} & set(sys.modules))); "
        "app.run([])"
    )
    environment = {**os.environ, **line, "_LSA_COMPLETE": f"complete_{shell}"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    ).stdout
    assert "--density-probes" in out and "--density-steps" in out and "--k-min" not in out
    assert "torch" not in out


@pytest.mark.parametrize("name", list(probe.modules()))
def test_every_option_of_a_probe_stands_in_its_help(name, capsys):
    assert app.run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    for option in probe.find(name).options.values():
        assert f"--{option.name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--optimizer", "foo", "--project", "tiny"], "unknown optimizer 'foo'"),
        (["train", "--optimizer", "sgd", "--project", "nope"], "unknown project 'nope'"),
        (["train", "--optimizer", "sgd", "--lr", "abc"], "given: 'abc'"),
        (["train", "--optimizer", "sgd", "--bogus", "1"], "No such option"),
        (["train"], "Missing option '--optimizer'"),
        (["lanczos", "--checkpoint", "deadbeef"], "no checkpoint 'deadbeef'"),
        (["lanczos", "--optimizer", "sgd", "--project", "tiny"], "make one with: lsa train"),
        (["lanczos", "--max_products", "x"], "given: 'x'"),
        (["interpolation", "--optimizer", "sgd"], "takes two checkpoints"),
        (["lanzcos"], "Did you mean 'lanczos'"),
        (["train", "--optimizer", "sgd", "--project", "tiny", "--device", "abacus"], "no device"),
    ],
)
def test_bad_input_gets_one_plain_line(workplace, capsys, arguments, message):
    assert app.run(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("lsa: ") and "\n" not in error


def test_a_signal_while_a_failure_is_told_ends_the_command_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(app, "_explained", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert app.run(["lanczos", "--kk", "1"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "lsa: stopped by SIGTERM\n"


def test_a_missing_database_driver_is_named(workplace, capsys, monkeypatch):
    def without_driver(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")

    monkeypatch.setattr("lsa.tracking.registered.listing", without_driver)
    assert app.run(["checkpoints"]) == 2
    assert "pip install 'psycopg[binary]'" in capsys.readouterr().err


def test_train_then_probe_from_the_command_line(workplace, capsys):
    assert app.run(["train", "--project", "tiny", "--optimizer", "sgd", "--epochs", "1"]) == 0
    assert "models:/tiny.sgd/1" in capsys.readouterr().out
    options = ["--project", "tiny", "--optimizer", "sgd", "--k", "1", "--max_products", "300"]
    assert app.run(["lanczos", *options]) == 0
    out = capsys.readouterr().out
    assert "lanczos/lambda_max " in out and "± " in out and "note: measured on 64 of 200" in out
    assert app.run(["checkpoints"]) == 0
    assert "models:/tiny.sgd/1" in capsys.readouterr().out


def test_a_plan_predicts_and_measures_nothing(workplace, capsys, monkeypatch):
    options = ["--project", "tiny", "--optimizer", "sgd"]
    app.run(["train", *options])
    capsys.readouterr()
    measured = cost.measured

    def taking(seconds: float) -> None:  # a sample, whatever the machine's speed
        names = "loss", "gradient", "product", "gauss_newton", "covariance", "curvature", "row"
        times = dict.fromkeys(names, seconds)
        monkeypatch.setattr(cost, "measured", lambda *a, **k: replace(measured(*a, **k), **times))

    taking(1e-6)  # the plan's ends round to the same second
    assert app.run(["lanczos", *options, "--density_probes", "0", "--plan"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("lanczos: about ") and "for 64 samples: gradient" in out
    assert "λ" not in out and "run  " not in out and "as the checkpoint is" not in out
    taking(0.1)  # they differ in minutes
    assert app.run(["sharpness", *options, "--plan"]) == 0
    spread = r"sharpness: about .* \(.* to .*, as the checkpoint is\), peak"
    assert re.match(spread, capsys.readouterr().out)


def test_mlproject_is_the_rendering_of_the_registry():
    text = (ROOT / "MLproject").read_text()
    assert text == mlproject.render(), "run `make mlproject`"
    content = yaml.safe_load(text)
    assert set(content["entry_points"]) == {"main", "train", "mode_graph", *probe.modules()}
    assert content["conda_env"] == "conda.yaml"
