"""The mode graph: from numbers that are planted, and from the runs of a study."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from lsa import project
from lsa.cli import app
from lsa.figures import draw
from lsa.probe import Curve, Metric, Result
from lsa.runtime.errors import InputError
from lsa.studies import mode_study, plan
from lsa.studies.mode_graph import HEADINGS, NAME, WAYS, Pair, graph, rows
from lsa.studies.study import study
from lsa.tracking import runs

PAGE = Path(__file__).parents[2] / "docs" / "probes" / "mode_graph.md"
MINIMA = np.array([0.01, 0.02, 0.03, 0.04])
# Two valleys, 0 1 and 2 3; of the four passes between them the one from 1 to 2 is the lowest.
PASSES = {(0, 1): 0.1, (2, 3): 0.2, (1, 2): 0.5, (0, 2): 0.7, (0, 3): 0.5005, (1, 3): 0.6}
ERROR = 0.01


def stored(metrics: dict[str, float], **curves: Curve) -> dict[str, Any]:
    named = {k: Metric(v, "loss", {"data": ERROR * v}) for k, v in metrics.items()}
    return json.loads(json.dumps(Result(named, curves).to_dict()))


def pair(a: int, b: int, passed: float) -> Pair:
    alphas = np.array([-0.5, 0, 0.5, 1, 1.5])
    losses = np.array([1, MINIMA[a], 2, MINIMA[b], 1])
    line = stored(
        {"barrier_max": 4 * passed, "barrier_max_aligned": 3 * passed},
        train_loss=Curve(alphas, losses, "alpha", ERROR * losses),
    )
    barrier = passed - max(MINIMA[a], MINIMA[b])
    path = stored({"path_loss": passed, "barrier": barrier, "curve_barrier": 2 * passed})
    return Pair(a, b, {"interpolation": line, "auto_neb": path})


def planted(*without: tuple[int, int]) -> Result:
    pairs = [pair(*ends, passed) for ends, passed in PASSES.items() if ends not in without]
    return graph(["a s0", "a s1", "b s0", "b s1"], pairs)


def array(result: Result, name: str) -> np.ndarray:
    return result.arrays[f"mode_graph.{name}"]


def test_the_tree_takes_the_planted_passes_and_the_table_has_every_way():
    found = planted()
    assert array(found, "edges").tolist() == [[0, 1], [2, 3], [1, 2]]
    off = ~np.eye(4, dtype=bool)
    same = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], bool)
    expected = np.where(same, np.where(np.arange(4) < 2, 0.1, 0.2), 0.5)
    assert np.array_equal(array(found, "minimax")[off], expected[off])
    assert array(found, "minima").tolist() == MINIMA.tolist()
    table = rows(found)
    assert len(table) == 6 and all(len(row) == len(HEADINGS) for row in table)
    assert table[2] == [
        "a s0 – b s1", "2 ± 0.04", "1.5 ± 0.03", "1 ± 0.02", "0.46 ± 0.0092", "0.5 ± 0.01", "",
    ]  # fmt: skip
    assert table[3][-1] == "yes"


def test_every_number_has_an_error_that_cannot_be_too_small():
    found = planted().metrics
    edges = [(0, 1), (2, 3), (1, 2)]
    passes = np.array([PASSES[edge] for edge in edges])
    assert found["tree_loss"].value == pytest.approx(passes.mean())
    assert found["tree_loss"].errors["data"] == pytest.approx(ERROR * passes.mean())
    assert found["tree_loss_max"] == Metric(0.5, "loss", {"data": ERROR * 0.5})
    assert found["line_barrier"].value == pytest.approx(4 * np.mean(list(PASSES.values())))
    assert found["minima_loss"].value == pytest.approx(MINIMA.mean())
    # Samples in common: the error of a mean of equal numbers is that of each, and not smaller.
    together = np.random.default_rng(0).normal(size=(2000, 1)) * (ERROR * passes)
    assert together.mean(1).std() == pytest.approx(found["tree_loss"].errors["data"], rel=0.1)
    counted = {"n_checkpoints", "n_pairs", "n_shortcuts", "n_interchangeable"}
    assert all(m.errors for name, m in found.items() if name not in counted)


def test_what_the_tree_does_better_and_what_it_could_do_as_well_is_counted():
    found = planted()
    # 0.7 and 0.6 lie above 0.5 by more than 2 (0.007 + 0.005); 0.5005 does not.
    assert found.metrics["n_shortcuts"].value == 2
    assert found.metrics["n_interchangeable"].value == 1
    assert "2 pair(s) have a lower way over other checkpoints" in found.notes[0]
    assert "the tree is one of several" in found.notes[1]


def test_pairs_that_failed_are_told_and_may_leave_a_forest():
    some = planted((1, 2))
    assert some.converged and "5 of 6 pairs are measured" in some.notes[0]
    assert array(some, "edges").tolist()[2] == [0, 3]
    forest = planted((1, 2), (0, 2), (0, 3), (1, 3))
    assert not forest.converged and any("a forest" in note for note in forest.notes)
    assert rows(forest)[1] == ["a s0 – b s0", "–", "–", "–", "–", "–", ""]
    for figure in draw.figures(NAME, forest, "t").values():
        figure.canvas.draw()


def test_the_figure_has_the_rows_of_the_tree_on_both_sides():
    found = planted()
    figure = draw.figures(NAME, found, "t")["mode_graph.png"]
    figure.canvas.draw()
    matrix, tree = figure.axes[:2]
    labels = [text.get_text() for text in matrix.get_yticklabels()]
    assert labels == [text.get_text() for text in tree.get_yticklabels()]
    assert labels == [str(array(found, "nodes")[i]) for i in array(found, "order")]
    cells = {tuple(map(int, t.get_position())): t.get_text() for t in matrix.texts}
    assert cells[(1, 0)] == "0.4" and cells[(0, 1)] == "0.08"  # line above, path below
    assert {text.get_text() for text in tree.texts} == {"0.1", "0.2", "0.5"}


def test_every_number_stands_in_the_page():
    text = PAGE.read_text().split("\n## Metrics\n")[1]
    written = {}
    for line in re.findall(r"^\| `.*$", text, re.MULTILINE):
        name, unit, errors, _ = (cell.strip() for cell in line.split("|")[1:-1])
        written[name.strip("`")] = unit, errors
    found = planted().metrics
    assert written == {k: (m.unit, ", ".join(m.errors) or "–") for k, m in found.items()}


PAIRS = """
pairs:
  interpolation: {points: 5}
  auto_neb: {curve_steps: 5, cycles: 1, steps: 2, pivots: 2, between: 1}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
def test_one_command_measures_all_pairs_and_again_only_what_is_new(workplace, capsys):
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(file.read_text() + PAIRS)
    setting = project.load("tiny")
    command = ["mode_graph", "tiny", "--optimizers", "sgd", "--seeds", "0,1,2"]
    assert app.run([*command, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert re.match(r"9 of 9 steps to run: about \d+ s, peak memory about [\d.]+ GB\n", planned)
    assert not list(runs.finished_steps("tiny"))
    assert app.run(command) == 0
    printed = capsys.readouterr().out
    run_id = re.search(r"^run +(\w+)$", printed, re.MULTILINE)[1]
    done = runs.read(run_id)
    assert done.tags["lsa.step"] == NAME and done.metrics["steps_done"] == 3 + 2 * 3
    assert {"mode_graph.png", "mode_graph.json", "mode_graph.npz"} <= set(runs.files(run_id))
    # The numbers are those of the pairs' own runs.
    barriers = [
        one.metrics["auto_neb/barrier"]
        for one in runs.finished_steps("tiny")
        if one.tags["lsa.step"] == "auto_neb"
    ]
    assert len(barriers) == 3
    assert done.metrics["mode_graph/path_barrier"] == pytest.approx(np.mean(barriers), rel=1e-6)
    assert f"path_barrier         {done.metrics['mode_graph/path_barrier']:.6g} ± " in printed
    assert app.run([*command, "--plan"]) == 0
    assert capsys.readouterr().out == "0 of 9 steps to run\n"
    with study(setting, kind=NAME) as again:
        mode_study.run(setting, again, seeds=[0], optimizers=["sgd", "adamw"])
    states = [handle.state for handle in again.handles]
    assert states.count("reused") == 1 and states.count("done") == 1 + 2
    assert again.opened.id == run_id
    # A study of the project does not take pairs of two seeds for its own.
    found = plan._newest(list(runs.finished_steps("tiny")))
    assert {key[1] for key in found if key[0] == "auto_neb"} == {"sgd – adamw"}
    assert all(found[key].params["seed_b"] == str(key[2]) for key in found if " – " in key[1])
    assert "mode graph" in mlflow.get_run(run_id).info.run_name.replace("_", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizers", "sgd", "--seeds", "0"], "a mode graph of 1 checkpoint(s) has no pair"),
        (["--optimizers", "sgdd"], "unknown optimizer 'sgdd'"),
        (["--seeds", "one"], "seeds='one' must be whole numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_one_line(workplace, capsys, options, message):
    assert app.run(["mode_graph", "tiny", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_each_way_is_a_metric_of_its_probe():
    for step, name in WAYS.values():
        page = (PAGE.parent / f"{step}.md").read_text()
        assert f"`{name.removesuffix('_aligned')}" in page


def test_pairs_are_in_the_projects_order_so_that_its_own_study_has_measured_them(workplace):
    setting = project.load("tiny")
    subjects = mode_study._subjects(setting, ["adamw", "sgd"], [])
    assert subjects == [("sgd", 0), ("adamw", 0)]
    with pytest.raises(InputError, match="unknown optimizer"):
        mode_study._subjects(setting, ["lion"], [])
    assert list(combinations(subjects, 2)) == [(("sgd", 0), ("adamw", 0))]
