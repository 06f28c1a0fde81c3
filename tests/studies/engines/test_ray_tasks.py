"""Studies on Ray: the numbers of one process, and nothing lost with a worker."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import mlflow
import psutil
import pytest

from lsa import project, step, study
from lsa.cli import app
from lsa.runtime.errors import InputError
from lsa.studies import plan
from lsa.studies.engines import ray_tasks
from lsa.studies.engines.ray_tasks import CONTEXT, Cluster, Demand
from lsa.studies.schedule import Study
from lsa.studies.study import Failed
from lsa.tracking import store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's, SQLAlchemy's and Ray's own


# --- without Ray -----------------------------------------------------------------------------


def test_a_step_takes_what_its_forecast_says():
    offered = Cluster(cpus=16, gpus=0, largest_cpus=8, largest_memory=64e9)
    of = functools.partial(ray_tasks.demand, offered=offered, device="auto")
    assert of("train", peaks={"train": 10**9}, workers=None) == Demand(1, memory=10**9)
    assert of("lanczos", peaks={}, workers=4) == Demand(4)
    assert of("lanczos", peaks={"lanczos": 10**12}, workers=1) == Demand(8, memory=64 * 10**9)


def test_a_step_takes_a_part_of_a_gpu(monkeypatch):
    offered = Cluster(cpus=16, gpus=2, largest_cpus=16, largest_memory=64e9)
    total = 100 * CONTEXT
    monkeypatch.setattr(ray_tasks, "gpu_memory", lambda: total)
    of = functools.partial(ray_tasks.demand, offered=offered, workers=None)
    peaks = {"train": int(23.5 * CONTEXT), "lanczos": 2 * total}
    assert of("train", peaks=peaks, device="auto") == Demand(1, gpus=0.25)
    assert of("lanczos", peaks=peaks, device="cuda").gpus == 1  # as is the most that there is
    assert of("sharpness", peaks=peaks, device="auto").gpus == 1  # nothing is known of it
    assert of("train", peaks=peaks, device="cpu").gpus == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--engine", "ray"], "pip install 'loss-landscape-analysis[ray]'"),
        (["--address", "auto"], "add engine=ray"),
        (["--engine", "ray", "--workers", "0"], "'--workers': Input should be greater than"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(workplace, monkeypatch, capsys, options, line):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert app.run(["study", "tiny", *options]) == 2
    (only,) = capsys.readouterr().err.splitlines()
    assert line in only


# --- with it ----------------------------------------------------------------------------------


@pytest.fixture
def ray():
    """The package, with nothing running of it before or after."""
    found = pytest.importorskip("ray", reason="the extra ray is not installed")
    yield found
    found.shutdown()


@contextlib.contextmanager
def on_ray(setting: project.Project, workers: int = 2, **options) -> Iterator[Study]:
    of = functools.partial(ray_tasks.demand, peaks={}, device="cpu", workers=workers)
    demand = functools.partial(of, offered=ray_tasks.connect(None))
    make = functools.partial(ray_tasks.RayTasks, demand, setting.name)
    with study(setting, device="cpu", engine=make, **options) as running:
        yield running


def runs(**tags: str) -> list:
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return [r for r in found if tags.items() <= r.data.tags.items()]


def numbers() -> dict[tuple[str, str], float]:
    """(run, metric) → value of every finished step, but for what a clock says."""
    return {
        (r.info.run_name, k): v
        for r in runs()
        if "lsa.key" in r.data.tags and r.info.status == "FINISHED"
        for k, v in r.data.metrics.items()
        if "seconds" not in k
    }


@pytest.mark.full
@pytest.mark.slow
def test_ray_computes_what_one_process_computes(workplace, ray):
    """Bit for bit, since both use one thread per step."""
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(file.read_text() + "pairs: {interpolation: {points: 5}}\n")
    setting = project.load("tiny")
    with study(setting) as alone:
        plan.run(setting, alone)
    expected = numbers()
    other = f"sqlite:///{os.getcwd()}/other.db"
    store.use(other, other)
    with on_ray(setting) as running:
        plan.run(setting, running)
        # They yield no more to the machine's other work than this process does.
        children = psutil.Process().children(recursive=True)
        workers = [child.nice() for child in children if child.name().startswith("ray::")]
    assert set(workers) == {psutil.Process().nice()}
    assert [handle.state for handle in running.handles] == ["done"] * 5
    assert numbers() == expected and len({name for name, _ in expected}) == 5
    (parent,) = runs(**{"lsa.step": "study"})
    assert len(runs(**{"mlflow.parentRunId": parent.info.run_id})) == 3
    assert len(runs(**{"lsa.study": parent.info.run_id})) == 2  # trainings stand beside it
    assert not ray.is_initialized()


@pytest.mark.full
def test_a_failing_step_takes_those_with_it_that_have_not_begun(workplace, ray):
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(file.read_text().replace("lr: 0.1}", "lr: 1.0e+30}"))
    setting = project.load("tiny")
    failed = r"1 of the study's \d+ steps failed: train sgd seed 0: .*diverged"
    with pytest.raises(Failed, match=failed):
        # One at a time, the failing one first: else others may be done before it has begun.
        with on_ray(setting, workers=1, keep_going=False):
            bad, good = (step("train", optimizer=name) for name in ("sgd", "adamw"))
            probes = [step("lanczos", trained, k=1) for trained in (bad, good)]
            many = [step("lanczos", good, k=k) for k in range(2, 20)]
    assert (bad.state, probes[0].state) == ("failed", "skipped")
    assert many[-1].state == "skipped"
    with pytest.raises(InputError, match="not run: train sgd seed 0 failed"):
        _ = probes[0].result


def test_news_of_workers_are_not_waited_for():
    """Its actor may start after the steps: to wait would hide from the study that one failed."""

    class Ray:
        answered = False

        def wait(self, asked: list, timeout: float) -> tuple[list, list]:
            assert timeout == 0
            return (asked, []) if self.answered else ([], asked)

        def get(self, asked: str) -> list:
            assert self.answered
            return [(asked, 1, 2, "")]

    class Engine(ray_tasks.RayTasks):
        def __init__(self) -> None:
            asked = iter(["first", "second"])
            take = SimpleNamespace(remote=lambda: next(asked))
            self._ray, self._news, self._asked = Ray(), SimpleNamespace(take=take), None

    engine = Engine()
    assert not list(engine.news()) and not list(engine.news())
    engine._ray.answered = True
    assert [told[0] for told in (*engine.news(), *engine.news())] == ["first", "second"]
