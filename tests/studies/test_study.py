"""Studies on a real store: what runs, what is reused, what happens when steps or workers die."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import CancelledError, Future
from typing import Any

import mlflow
import psutil
import pytest
from processes import command, started

import lsa
from lsa import project, step, study
from lsa.runtime import provenance
from lsa.runtime.errors import InputError
from lsa.studies import plan
from lsa.studies.engines.local import Inline
from lsa.studies.schedule import Study
from lsa.studies.study import Failed
from lsa.tracking import store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own

PAIRS = "pairs: {interpolation: {points: 5}}\n"


@pytest.fixture
def tiny(workplace):
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(file.read_text() + PAIRS)
    return project.load("tiny")


def runs(**tags: str) -> list:
    """Runs of the store with these tags."""
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return [r for r in found if tags.items() <= r.data.tags.items()]


def numbers(found: list) -> dict[str, dict[str, float]]:
    """Run name → what is reproducible of its metrics."""
    timings = ("seconds", "system/")
    return {
        r.info.run_name: {
            k: v for k, v in r.data.metrics.items() if not any(t in k for t in timings)
        }
        for r in found
        if "lsa.key" in r.data.tags and r.info.status == "FINISHED"
    }


def states(of: Study) -> list[str]:
    return [handle.state for handle in of.handles]


def test_a_project_runs_everything_once_and_then_nothing(tiny):
    with study(tiny) as first:
        plan.run(tiny, first)
    assert states(first) == ["done"] * 5
    assert [h.call.label for h in first.handles[2:]] == [
        "lanczos sgd seed 0", "lanczos adamw seed 0", "interpolation sgd – adamw seed 0",
    ]  # fmt: skip
    assert first.handles[2]["lambda_max"].value > 0
    with study(tiny) as second:
        plan.run(tiny, second)
    assert states(second) == ["reused"] * 5
    (parent,) = runs(**{"lsa.step": "study"})  # the same run, taken up again
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["steps_reused"] == 5 and parent.data.metrics["steps_done"] == 0
    children = runs(**{"mlflow.parentRunId": parent.info.run_id})
    trainings = runs(**{"lsa.study": parent.info.run_id})
    assert len(children) == 3 and len(trainings) == 2  # which stand beside the study
    assert {"lanczos/lambda_max", "lanczos/lambda_max_se_data"} <= trainings[0].data.metrics.keys()
    assert "[Report](" in trainings[0].data.tags["mlflow.note.content"]
    assert {r.info.status for r in [*children, *trainings]} == {"FINISHED"}
    assert "lanczos" in mlflow.artifacts.load_text(f"runs:/{parent.info.run_id}/report.html")


def test_a_study_is_plain_python(workplace):
    with study("tiny") as running:
        for lr in (0.02, 0.1):
            trained = step("train", optimizer="sgd", lr=lr, epochs=1)
            sharp = step("lanczos", trained, k=1)
            if sharp["lambda_max"].value > 0 and lr > 0.05:
                step("perturbation", trained, points=5)
    assert [h.call.step for h in running.handles] == ["train", "lanczos"] * 2 + ["perturbation"]
    assert states(running) == ["done"] * 5
    # What the project's names do not lead to is named by its run, with all that is not a default.
    trained, probed = running.handles[2], running.handles[4]
    assert probed.command == f"lsa perturbation --checkpoint {trained.run_id} --points 5"
    assert trained.command == (
        "lsa train --project tiny --optimizer sgd --seed 0 --lr 0.1 --epochs 1"
    )
    again = step("train", project="tiny", optimizer="sgd", lr=0.1, epochs=1)  # without a study
    assert again.state == "reused" and again.run_id == running.handles[2].run_id
    assert step("lanczos", again, k=1).state == "reused"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: step("train"), "train needs optimizer"),
        (lambda t: step("train", optimizer="sdg"), "unknown optimizer 'sdg'"),
        (lambda t: step("train", optimizer="sgd", lrr=1), "no option 'lrr'"),
        (lambda t: step("lanczos"), r"takes 1 training\(s\)"),
        (lambda t: step("lanczos", t, kk=1), "no option 'kk'"),
        (lambda t: step("interpolation", t), r"takes 2 training\(s\)"),
        (lambda t: step("lanzcos", t), "did you mean 'lanczos'"),
    ],
)
def test_a_step_asked_for_wrongly_is_refused_when_asked_for(workplace, call, message):
    with study("tiny"), pytest.raises(InputError, match=message):
        call(step("train", optimizer="sgd"))


class Dropping:
    """An engine whose first call fails, and which hears that a dropped one had begun."""

    background = chained = True
    slots = float("inf")

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int, str]] = []
        self.labels: dict[Future, str] = {}

    def submit(self, _function: Any, call: Any, *_needs: Future) -> Future:
        future: Future = Future()
        if not self.labels:
            future.set_exception(InputError("the first fails"))
        self.labels[future] = call.label
        return future

    def cancel(self, future: Future) -> None:
        future.set_exception(CancelledError())
        self.told.append((self.labels[future], 0, 0, ""))

    def news(self) -> list[tuple[str, int, int, str]]:
        told, self.told = self.told, []
        return told


def test_a_dropped_step_has_not_failed_though_it_had_begun(tiny):
    """News that it had begun may come after it was dropped."""
    dropping = Study(tiny, Dropping(), keep_going=False)
    for optimizer in ("sgd", "adamw"):
        dropping.step("train", optimizer=optimizer, seed=0)
    dropping.advance()
    assert states(dropping) == ["failed", "skipped"]
    assert [handle.error for handle in dropping.handles] == ["the first fails", "not run"]


def test_workers_compute_what_one_process_computes(tiny, monkeypatch):
    """Bit for bit, since both use one thread per step."""
    with study(tiny) as alone:
        plan.run(tiny, alone)
    expected = numbers(runs())
    other = f"sqlite:///{os.getcwd()}/other.db"
    store.use(other, other)
    with study(tiny, workers=2) as running:
        plan.run(tiny, running)
    assert states(running) == ["done"] * 5
    assert numbers(runs()) == expected and len(expected) == 5
    (parent,) = runs(**{"lsa.step": "study"})
    assert len(runs(**{"mlflow.parentRunId": parent.info.run_id})) == 3
    assert len(runs(**{"lsa.study": parent.info.run_id})) == 2  # trainings stand beside it


def test_a_failing_step_does_not_stop_the_others(workplace):
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(file.read_text().replace("lr: 0.1}", "lr: 1.0e+30}") + PAIRS)
    setting = project.load("tiny")
    with pytest.raises(Failed, match="1 of the study's 5 steps failed: train sgd") as caught:
        with study(setting) as running:
            plan.run(setting, running)
    assert "lsa train --project tiny --optimizer sgd --seed 0" in str(caught.value)
    assert states(running) == ["failed", "done", "skipped", "done", "skipped"]
    with pytest.raises(InputError, match="lanczos sgd seed 0: not run: train sgd seed 0 failed"):
        _ = running.handles[2].result
    with pytest.raises(Failed), study(setting, keep_going=False) as running:
        plan.run(setting, running)
    assert states(running) == ["failed"] + ["skipped"] * 4


def test_a_worker_that_dies_costs_its_step_one_more_try(tiny):
    with study(tiny, workers=2) as running:
        step("train", optimizer="sgd", epochs=100)
        deadline = time.monotonic() + 60
        while not runs(optimizer="sgd") and time.monotonic() < deadline:
            time.sleep(0.1)
        (busy,) = runs(optimizer="sgd")
        os.kill(int(busy.data.tags["lsa.process"].partition("@")[0]), signal.SIGKILL)
    assert states(running) == ["done"]
    assert sorted(r.info.status for r in runs(optimizer="sgd")) == ["FINISHED", "KILLED"]


@pytest.mark.full
def test_workers_know_a_probe_that_the_script_declares(workplace):
    code = """
    from typing import Annotated
    import torch
    from lsa import Metric, Result, step, study
    from lsa.probe import probe

    @probe(headline=("norm",))
    def weights(theta: torch.Tensor, *, p: Annotated[float, "order of the norm"] = 2.0) -> Result:
        "Norm of the weights."
        return Result({"norm": Metric(torch.linalg.vector_norm(theta, p).item())})

    if __name__ == "__main__":
        with study("tiny", workers=2):
            found = [step("weights", step("train", optimizer=o), p=1.0) for o in ("sgd", "adamw")]
            norms = [f["norm"].value for f in found]  # waits
            print(*(f"{f.state} {norm:.6g}" for f, norm in zip(found, norms)))
    """
    script = workplace / "mine.py"
    script.write_text(textwrap.dedent(code))
    environment = os.environ | {"MLFLOW_TRACKING_URI": store.uri()}
    first, second = (
        subprocess.run(
            [sys.executable, script], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    )
    norm = lsa.load(optimizer="sgd", project="tiny").theta.abs().sum().item()
    found = first.split()
    assert found[::2] == ["done", "done"] and float(found[1]) == pytest.approx(norm, rel=1e-5)
    assert second.split() == ["reused", found[1], "reused", found[3]]


@pytest.mark.full
def test_a_study_that_is_killed_leaves_no_process_and_is_taken_up_again(tiny, workplace):
    code = """
    from lsa import step, study
    if __name__ == "__main__":
        with study("tiny", workers=2):
            step("train", optimizer="sgd", epochs=2000)
            step("train", optimizer="adamw", epochs=2000)
    """
    script = workplace / "mine.py"
    script.write_text(textwrap.dedent(code))
    environment = os.environ | {"MLFLOW_TRACKING_URI": store.uri()}
    store.client()  # made here: `runs` below and the study would make its tables at once
    with started([sys.executable, script], env=environment) as process:
        deadline = time.monotonic() + 60
        while len(runs(**{"lsa.step": "train"})) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive
    assert {r.info.status for r in runs(**{"lsa.step": "train"})} == {"KILLED"}  # told to stop
    with study("tiny") as running:
        step("train", optimizer="sgd", epochs=2)
    assert states(running) == ["done"]
    assert "RUNNING" not in {r.info.status for r in runs()}


@pytest.mark.slow
def test_two_studies_at_once_share_their_steps(tiny):
    env = os.environ | {"MLFLOW_TRACKING_URI": store.uri()}
    with command("study", "tiny", env=env) as first, command("study", "tiny", env=env) as second:
        for process in (first, second):
            process.join(120)
            assert process.exitcode == 0
    keys = [r.data.tags["lsa.key"] for r in runs() if "lsa.key" in r.data.tags]
    assert len(keys) == len(set(keys)) == 5  # no step twice


def test_an_outlook_says_what_would_run_and_why(tiny, monkeypatch):
    def outlook() -> dict[str, str]:
        return {o.planned.label: f"{o.state} {o.why}".strip() for o in plan.outlook(tiny)}

    assert set(outlook().values()) == {"new"}
    small = plan.only(tiny, ["lanczos"])
    with study(small) as running:
        plan.run(small, running)
    labels = [h.call.label for h in running.handles]
    pair = "interpolation sgd – adamw seed 0"
    assert outlook() == dict.fromkeys(labels, "reused") | {pair: "new"}
    # An edited probe: another hash of the code that computes it.
    code_hash = provenance.code_hash
    edited = lambda module: code_hash(module) + "!" * (module == "lsa.probes.lanczos")  # noqa: E731
    monkeypatch.setattr(provenance, "code_hash", edited)
    found = outlook()
    assert {k for k, v in found.items() if v == "changed code, data or samples"} == {
        "lanczos sgd seed 0", "lanczos adamw seed 0",
    }  # fmt: skip
    monkeypatch.undo()
    tiny.probes["lanczos"]["k"] = 1
    assert outlook()["lanczos sgd seed 0"] == "changed k: 2 → 1"
    with pytest.raises(InputError, match=r"no probe 'lanzcos'\. Did you mean 'lanczos'"):
        plan.only(tiny, ["lanzcos"])


def test_probes_along_trainings_are_steps_like_the_others(workplace):
    file = workplace / "projects" / "tiny.yaml"
    text = file.read_text().replace("batch_size: 50}", "batch_size: 50, checkpoint_every: 1}")
    file.write_text(text + "trajectory: {lanczos: {k: 1, density_probes: 0, split: 'no'}}\n")
    setting = project.load("tiny")
    small = plan.only(setting, ["trajectory.lanczos"])
    assert not small.probes and {o.state for o in plan.outlook(small)} == {"new"}
    with study(small) as running:
        plan.run(small, running)
    assert [h.call.label for h in running.handles[2:]] == [
        "trajectory.lanczos sgd seed 0", "trajectory.lanczos adamw seed 0",
    ]  # fmt: skip
    assert running.handles[2].command == (
        "lsa lanczos --project tiny --optimizer sgd --seed 0 --epochs all"
    )
    assert running.handles[2]["lambda_max"].value > 0
    found = plan.outlook(small)
    assert {o.state for o in found} == {"reused"}
    with study(small) as again:
        plan.run(small, again)
    assert states(again) == ["reused"] * 4
    setting.trajectory["lanczos"]["k"] = 2
    assert "k: 1 → 2" in [o.why for o in plan.outlook(setting)]
    cost = plan.forecast(setting, plan.outlook(setting))
    assert cost.seconds["trajectory.lanczos"] > 0 and not cost.unknown


def test_a_trajectory_without_checkpoints_is_refused_when_asked_for(workplace):
    with study("tiny"):
        trained = step("train", optimizer="sgd")
        with pytest.raises(InputError, match=r"set train\.checkpoint_every"):
            step("trajectory.lanczos", trained)
        with pytest.raises(InputError, match="takes two checkpoints"):
            step("trajectory.interpolation", trained)


class Chained(Inline):
    """Takes steps before what they need has run, as a cluster does; all are over at once."""

    background = chained = True
    slots = math.inf


def test_a_step_and_what_it_needs_may_end_together(workplace):
    """In any order: of eight probes and their training, the training is rarely taken first."""
    with study("tiny", engine=lambda _: Chained()) as running:
        trained = step("train", optimizer="sgd")
        for k in range(1, 9):
            step("lanczos", trained, k=k, density_probes=0, split="no")
    assert {handle.state for handle in running.handles} == {"done"}


def test_what_a_worker_could_not_end_is_ended_with_the_study(workplace):
    """As of one that was killed because it did not stop in time."""
    client = mlflow.MlflowClient()
    with study("tiny", engine=lambda _: Chained()):
        run_id = step("train", optimizer="sgd").run_id
        pid = provenance.machine("cpu")["lsa.process"].partition("@")[0]
        client.set_tag(run_id, "lsa.process", f"{pid}@1.00")  # another process of that number
        client.update_run(run_id, status="RUNNING")
    assert client.get_run(run_id).info.status == "KILLED"


def test_a_handle_goes_to_another_process_as_its_finished_step(tiny):
    with study(tiny):
        trained = step("train", optimizer="sgd")
        measured = step("lanczos", trained, k=1)
        found = pickle.loads(pickle.dumps(measured))
    assert (found.run_id, found.state) == (measured.run_id, "done")
    assert found.result == measured.result and found.command == measured.command
    assert step("sgd_noise", found.needs[0]).state == "done"
