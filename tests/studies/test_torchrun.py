"""`torchrun -m lsa`: one run of the same numbers, and one plain line when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import torch.distributed as dist
from processes import started
from two_ranks import on_two_ranks

import lsa
from lsa.cli import app

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # MLflow's own
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lsa"]
OF_SGD = ["--project", "tiny", "--optimizer", "sgd"]


def environment() -> dict[str, str]:
    return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{os.getcwd()}/mlflow.db"}


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*TORCHRUN, *arguments], capture_output=True, text=True, env=environment(), timeout=200
    )


def said(errors: str) -> list[str]:
    """What lsa said, without torchrun's own table."""
    return [line for line in errors.splitlines() if line.startswith("lsa: ")]


def probed() -> list:
    tags = "tags.`lsa.step` = 'lanczos'"
    return mlflow.search_runs(search_all_experiments=True, filter_string=tags, output_format="list")


def eigenvalues() -> str:
    """The run that a rank has made, or nothing."""
    return lsa.measure("lanczos", lsa.load(optimizer="sgd", project="tiny"), k=3).run_id


def of_forked_ranks() -> None:
    assert sorted(map(bool, on_two_ranks(eigenvalues))) == [False, True]  # one process logs


def of_torchrun() -> None:
    done = torchrun("lanczos", *OF_SGD, "--k", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nrun  ") == 1  # one process speaks


@pytest.mark.parametrize(
    "measure", [of_forked_ranks, pytest.param(of_torchrun, marks=pytest.mark.full)]
)
def test_two_processes_log_one_run_with_the_eigenvalues_of_one(trained, monkeypatch, measure):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment()["MLFLOW_TRACKING_URI"])
    alone = lsa.measure("lanczos", lsa.load(trained.run_id), k=3)
    measure()
    together, before = probed()
    assert before.info.run_id == alone.run_id
    assert together.data.tags["lsa.ranks"] == "2" and together.info.status == "FINISHED"
    for name in ("lambda_max", "lambda_min", "trace", "gradient_norm"):
        logged = together.data.metrics[f"lanczos/{name}"]
        assert logged == pytest.approx(alone[name].value, rel=1e-5)
    error = together.data.metrics["lanczos/lambda_max_se_data"]
    assert error == pytest.approx(alone["lambda_max"].errors["data"], rel=1e-5)
    values = [
        [m.value for m in mlflow.MlflowClient().get_metric_history(run, "lanczos/eigenvalue")]
        for run in (together.info.run_id, alone.run_id)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.full
def test_a_probe_along_a_training_is_shared_too(workplace):
    file = workplace / "projects" / "tiny.yaml"
    kept = file.read_text().replace("batch_size: 50}", "batch_size: 50, checkpoint_every: 1}")
    file.write_text(kept)
    final = lsa.load(lsa.step("train", project="tiny", optimizer="sgd").run_id)
    alone = lsa.measure_trajectory("lanczos", final, k=1, density_probes=0, split="no")
    options = ["--k", "1", "--density-probes", "0", "--split", "no", "--epochs", "all"]
    done = torchrun("lanczos", *OF_SGD, *options)
    assert done.returncode == 0, done.stderr
    key = "trajectory.lanczos/lambda_max"
    found = mlflow.search_runs(
        search_all_experiments=True,
        filter_string="tags.`lsa.step` = 'trajectory.lanczos'",
        output_format="list",
    )
    together, before = (
        {m.step: m.value for m in mlflow.MlflowClient().get_metric_history(r.info.run_id, key)}
        for r in found
    )
    assert found[1].info.run_id == alone.run_id and before.keys() == {0, 1, 2}
    assert together == pytest.approx(before, rel=1e-5)


def reused() -> tuple[str, bool]:
    """A step that has been measured, asked for by a rank."""
    found = lsa.measure("lanczos", lsa.load(optimizer="sgd", project="tiny"), k=1, reuse=True)
    return found.run_id, found.reused


def test_what_is_measured_already_keeps_no_rank_waiting(trained, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment()["MLFLOW_TRACKING_URI"])
    alone = lsa.measure("lanczos", lsa.load(trained.run_id), k=1)
    assert on_two_ranks(reused) == [(alone.run_id, True), ("", True)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["lanczos", *OF_SGD, "--k", "0"], "k=0"),
        (["lanczos", *OF_SGD, "--kk", "1"], "No such option"),
    ],
)
def test_bad_input_is_told_once(trained, arguments, line):
    done = torchrun(*arguments)
    (only,) = said(done.stderr)
    assert line in only and done.returncode != 0
    assert not [run for run in probed() if run.info.status == "RUNNING"]


def test_training_is_not_shared(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("0", "lsa: train runs in one process"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert app.run(["train", *OF_SGD]) == 2
        assert capsys.readouterr().err.startswith(expected)
        assert expected or not capsys.readouterr().err


@pytest.mark.parametrize("order", ["01", "10"])
def test_whichever_rank_fails_first_tells_and_its_end_may_stop_the_others(
    order, monkeypatch, capsys
):
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True)  # pyright: ignore
    for name, value in {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agent.port),
    }.items():
        monkeypatch.setenv(name, value)
    for rank, expected in zip(order, ("lsa: No such option: --kk", ""), strict=True):
        monkeypatch.setenv("RANK", rank)
        assert app.run(["lanczos", "--kk", "1"]) == 2
        assert capsys.readouterr().err.partition(" (")[0].partition(";")[0] == expected


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_ends_all_with_one_line(trained, rank, tmp_path):
    command = [*TORCHRUN, "lanczos", *OF_SGD, "--density-probes", "100000"]
    log = Path(tmp_path, "errors")
    with log.open("w") as errors, started(command, stderr=errors, env=environment()) as process:
        deadline = time.monotonic() + 120
        while not probed():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        workers = psutil.Process(process.pid).children()  # a worker may have one, such as git
        (victim,) = [w for w in workers if w.environ().get("RANK") == str(rank)]
        victim.kill()
        assert process.wait(120) != 0
        assert not psutil.wait_procs(workers, timeout=30)[1]
    assert len(said(log.read_text())) == 1
    (run,) = probed()
    # The first rank logs: what it cannot end any more, the other does.
    assert run.info.status in (("KILLED",) if rank == 0 else ("FAILED", "KILLED"))
