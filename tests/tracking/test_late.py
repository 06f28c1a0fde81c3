"""What a server did after its client had stopped waiting, and what is double by it."""

from __future__ import annotations

import pytest
from faults import server
from faults.proxy import Proxy, first, none
from servers import IMPATIENT, environment, lsa

from lsa.cli import app
from lsa.tracking import late, registered, run, runs, store


def told(capsys, *command: str, code: int = 0) -> str:
    assert app.run(list(command)) == code
    return capsys.readouterr().out


def version_again(done) -> str:
    """What the first of two requests does that is carried out after the second."""
    (version,) = store.client().search_model_versions("")
    again = store.client().create_model_version(
        version.name, version.source, done.run_id, tags=version.tags, model_id=version.model_id
    )
    return f"checkpoint models:/{again.name}/{again.version}"


def run_again(done) -> str:
    tags = store.client().get_run(done.run_id).data.tags
    experiment = store.client().get_run(done.run_id).info.experiment_id
    return f"run {store.client().create_run(experiment, tags=tags).info.run_id}"


def model_again(done) -> str:
    model = next(m for m in runs.models_of(done.run_id) if m.tags["epoch"] == "2")
    again = store.client().create_logged_model(
        model.experiment_id, model.name, done.run_id, model.tags, model_type=model.model_type
    )
    return f"model {again.model_id}"


@pytest.mark.parametrize("again", [version_again, run_again, model_again])
def test_what_is_there_twice_is_told_and_removed(again, trained, capsys):
    assert not list(late.doubles())
    before = told(capsys, "checkpoints")
    double = again(trained)
    assert [one.what for one in late.doubles()] == [double]
    assert told(capsys, "checkpoints") == before
    assert f"1 made twice, after a client had stopped waiting: {double};" in told(capsys, "doctor")
    assert told(capsys, "sync") == (
        f"{double}: removed; it was there twice, since the server had answered late\n"
    )
    assert not list(late.doubles())
    assert told(capsys, "sync").startswith("nothing waits in")
    assert registered.find("tiny", "sgd", 0) == trained.checkpoint
    (model,) = [m for m in runs.models_of(trained.run_id) if m.tags["epoch"] == "2"]
    assert str(model.status) == "READY" and not runs.running()


def test_a_checkpoint_that_is_registered_twice_is_one(trained):
    version_again(trained)
    assert registered.find("tiny", "sgd", 0) == trained.checkpoint
    assert registered.resolve(trained.run_id) == trained.checkpoint
    assert [one.address for one in registered.listing()] == [trained.checkpoint]


def test_what_somebody_has_chosen_or_named_stays(trained):
    """An alias, another name, and a run or model of a step that is not finished."""
    double = version_again(trained).rpartition("/")[2]
    (source, *_) = store.client().search_model_versions("")
    store.client().set_registered_model_alias("tiny.sgd", "best", double)
    store.client().create_registered_model("served")
    store.client().create_model_version(
        "served", source.source, trained.run_id, tags=source.tags, model_id=source.model_id
    )
    experiment = store.client().get_run(trained.run_id).info.experiment_id
    begun = store.client().create_run(experiment, tags={run.TOKEN: "of its own"}).info.run_id
    store.client().create_logged_model(experiment, "new", begun, model_type="lsa.checkpoint")
    assert not list(late.doubles())


# Method, end of the path → what is double when it is carried out late.
REQUESTS = {
    "version": ("POST", "model-versions/create", "checkpoint models:/tiny.sgd/2"),
    "run": ("POST", "runs/create", "run "),
    "model": ("POST", "/logged-models", "model "),
}


@pytest.mark.full
@pytest.mark.timeout(600)
def test_requests_that_a_server_carries_out_after_all_leave_nothing_double(tmp_path):
    """The client's second request is served, and it ends, before the first is."""
    with server.server(tmp_path, epochs=2) as (served, client), Proxy(served.uri) as proxy:
        env = environment(MLFLOW_TRACKING_URI=proxy.uri, **IMPATIENT)
        for seed, (method, end, double) in enumerate(REQUESTS.values()):
            proxy.rule = first("late", method, end)
            step = ["--project", "tiny", "--optimizer", "sgd", "--seed", str(seed)]
            lsa("train", *step, cwd=client, env=env)
            proxy.rule = none
            listed = lsa("checkpoints", cwd=client, env=env).stdout
            assert lsa("sync", cwd=client, env=env).stdout.startswith("nothing waits")
            assert proxy.catch_up() == 1
            assert lsa("checkpoints", cwd=client, env=env).stdout == listed
            removed = lsa("sync", cwd=client, env=env).stdout
            assert removed.startswith(double) and removed.count("removed") == 1, removed
        found = server.runs(served.uri, "")
        assert {one.info.status for one in found} == {"FINISHED"} and len(found) == len(REQUESTS)
        versions = server.asking(served.uri).search_model_versions("")
        assert len(versions) == len({v.run_id for v in versions}) == len(REQUESTS)
