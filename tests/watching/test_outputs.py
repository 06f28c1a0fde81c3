"""Where the numbers of a watch go."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lsa
from lsa.figures.watch import draw
from lsa.watching import budget, live, outputs

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def train(steps: int, **options) -> lsa.watching.watch.Watch:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(32, 6), torch.arange(32) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    given = {"batches": (x, y), "every": 7, "budget": None, "log_every": 5, "strict": True}
    with lsa.watch(model, optimizer, **(given | options)) as watch:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return watch


def test_the_active_run_has_metrics_at_optimizer_steps_a_table_and_a_figure(
    workplace: Path, tmp_path: Path
):
    with mlflow.start_run() as run:
        watch = train(21)
        assert mlflow.active_run() is not None
    client = mlflow.MlflowClient()

    def steps(name: str) -> list[int]:
        return sorted(m.step for m in client.get_metric_history(run.info.run_id, f"watch/{name}"))

    assert steps("gradient_norm") == [1, 5, 7, 10, 14, 15, 20, 21]
    assert steps("directional_sharpness") == [7, 14, 21]
    assert steps("gradient_norm/0") == [1, 7, 14, 21]
    assert steps("overhead") == steps("gradient_norm")
    names = {f.path for f in client.list_artifacts(run.info.run_id, "watch")}
    assert names == {"watch/history.csv", "watch/watch.png"}
    import pandas

    file = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path="watch/history.csv", dst_path=str(tmp_path)
    )
    assert list(pandas.read_csv(file).step) == list(range(1, 22)) == list(watch.history.step)


def test_a_sink_takes_them_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[int, dict[str, float]]] = []
    train(10, sink=lambda values, step: seen.append((step, dict(values))), step=100)
    assert [step for step, _ in seen] == [101, 105, 110]
    assert all(name.startswith("watch/") for _, values in seen for name in values)
    assert not [*tmp_path.iterdir()]


class Sender:
    """A stream whose thread takes a second for a number; it does its work at once."""

    price = 1.0

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, []

    def put(self, values: Mapping[str, float], step: int) -> None:
        self.seconds += len(values) * self.price
        self.steps.append(step)


@pytest.mark.parametrize("share", [None, 0.02])
def test_sending_has_a_part_of_the_budget(share: float | None, monkeypatch: pytest.MonkeyPatch):
    """It took 3 % of the time that a small network trained for."""
    now = 0.0
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: now))
    kept = budget.Budget(share)
    with kept.counted():
        now += 1.0
    given = outputs.Outputs(None, track=False, live=False, log_every=10, every=100)
    given.open(kept)
    given._stream = sender = Sender()
    for step in range(1, 10_001):
        now += 10.0
        kept.has_made(step)
        if step % 7 == 0:  # whatever norms the budget leaves
            given.put(step, {"a": 1.0, "b": 2.0})
    taken = sender.seconds / kept.training
    if share is None:
        assert 990 <= len(sender.steps) <= 1000
    else:
        assert 0.8 * outputs.SENDING * share < taken <= outputs.SENDING * share
    assert kept.spent == pytest.approx(1.0 + sender.seconds, abs=4.0)


def test_an_error_in_a_training_ends_the_run_of_the_watch_as_failed(workplace: Path):
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError), lsa.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        raise KeyError("of the training")
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.status == "FAILED"


def test_the_line():
    row = {"loss": 0.51234, "critical_factor": 2.34, "threshold_ratio": 0.5, "overhead": 0.011}
    assert live.text(70, row) == (
        "step 70  loss 0.5123  critical × 2.3  sharpness/threshold 0.50  watch 1.1%"
    )


def test_a_narrow_terminal_has_one_line_too(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "40")
    line = live.Line()
    line.show(70, {"loss": 0.51234, "critical_factor": 2.34, "threshold_ratio": 0.5})
    line.close()
    assert stream.getvalue().strip() == "step 70  loss 0.5123  critical × 2.3  s…"


def test_the_figure_names_its_alarms_once():
    figure = draw(lambda name: ([8, 9], [1.0, 2.0]), "", [8, 9])
    for panel in figure.axes:
        legend = panel.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()].count("alarm") == 1


def test_the_figure_has_a_panel_for_each_group_that_was_measured():
    watch = train(21, track=False)
    labels = [panel.get_ylabel() for panel in watch.figure().axes]
    assert labels[:4] == ["loss", "sharpness (loss)", "critical factor", "norm"]


def test_the_figure_shows_the_interval_of_the_noise_scale():
    numbers = {"noise_scale": [50.0, 60.0], "noise_scale_low": [0.0, 40.0]}
    numbers["noise_scale_high"] = [90.0, 80.0]
    for known, bands in ((numbers, 1), ({"noise_scale": [50.0, 60.0]}, 0)):
        figure = draw(lambda name, k=known: ([8, 9], k[name]) if name in k else ([], []), "")
        (panel,) = figure.axes
        assert len(panel.collections) == bands
        low, high = panel.get_ylim()
        assert 1 < low < 50 and 60 < high < 1000
