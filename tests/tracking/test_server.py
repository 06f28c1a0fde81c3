"""`lsa server`: MLflow's own server on SQLite and PostgreSQL, and a client that shares no disk."""

from __future__ import annotations

import json
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import PROJECT
from processes import forked
from servers import Served, asked, environment, lsa, postgres

from lsa.runtime.errors import InputError
from lsa.tracking import metric_histories, server, store
from lsa.tracking.server import Server

ROOT = Path(__file__).parents[2]
PASSWORD = "correct horse battery"


# --- settings -------------------------------------------------------------------------------------


def test_only_the_names_given_and_its_own_are_answered(tmp_path):
    own = ["127.0.0.1", "127.0.0.1:*", "localhost", "localhost:*", "[::1]", "[[]::1]:*"]
    assert server.allowed(Server(tmp_path)) == own
    assert server.allowed(Server(tmp_path, host="10.0.0.5")) == ["10.0.0.5", "10.0.0.5:*", *own]
    wide = Server(tmp_path, host="0.0.0.0", allowed_hosts=("a.org:443", "*.b.org"))
    assert server.allowed(wide) == ["a.org:443", "*.b.org", *own]
    six = Server(tmp_path, host="fd00::5", allowed_hosts=("[fd00::6]:443", "B.org"))
    named = ["[fd00::5]", "[[]fd00::5]:*", "[fd00::6]:443", "b.org", "b.org:*"]
    assert server.allowed(six) == [*named, *own]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "give those by which clients call it: allowed_hosts="),
        ({"store": "postgresql://me:secret@db/x"}, "a password on the command line is seen"),
        (
            {"store": "postgresql://me@127.0.0.1:1/x"},
            r"cannot reach the store postgresql\+psycopg://me@127",
        ),
        ({"store": "no address"}, "cannot reach the store no address: not an address"),
        ({"auth": True}, "set MLFLOW_AUTH_ADMIN_PASSWORD"),
        ({"host": "203.0.113.1"}, r"cannot listen on 203.0.113.1:\d+ \(Cannot assign"),
    ],
)
def test_what_cannot_start_is_refused_in_one_line(tmp_path, monkeypatch, options, message):
    if "@" in options.get("store", ""):
        pytest.importorskip("psycopg")
    if "auth" in options:
        pytest.importorskip("flask_wtf")
    monkeypatch.delenv(server.PASSWORD, raising=False)
    with pytest.raises(InputError, match=message) as caught:
        server.serve(Server(tmp_path, port=_free(), **options))
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_port_that_is_taken_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"cannot listen on 127\.0\.0\.1:"):
            server.serve(Server(tmp_path, port=taken.getsockname()[1]))


def test_a_missing_package_for_logins_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mlflow\[auth\]'"):
        server.serve(Server(tmp_path, port=_free(), auth=True))


def _free() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_what_is_secret_is_handed_on_in_the_environment_alone(tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf")
    started = {}
    monkeypatch.setattr(os, "chdir", lambda folder: None)
    monkeypatch.setattr(
        os, "execve", lambda program, command, env: started.update(command=command, env=env)
    )
    monkeypatch.setenv(server.PASSWORD, PASSWORD)
    monkeypatch.setattr(os, "umask", started.setdefault("umask", []).append)
    server.serve(Server(tmp_path / "s", port=_free(), auth=True, artifacts="s3://b/x"))
    given = started["env"]
    assert started["umask"] == [0o077]
    assert given["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/s/mlflow.db"
    assert given["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://b/x"
    assert (tmp_path / "s" / "mlflow.db").exists()
    for secret in ("session.key", "logins.ini"):
        assert (tmp_path / "s" / secret).stat().st_mode & 0o077 == 0
    key = (tmp_path / "s" / "session.key").read_text()
    assert given["MLFLOW_FLASK_SERVER_SECRET_KEY"] == key and len(key) == 64
    words = " ".join(started["command"])
    assert not any(secret in words for secret in (PASSWORD, key, "sqlite"))


# --- compose.yaml, which no test here can run -----------------------------------------------------


def test_the_compose_file_holds_together():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"postgres", "storage", "bucket", "mlflow"}
    for name, one in services.items():
        assert one.get("image", "").count(":") == 1 or "build" in one, name  # a version is named
        for needed, how in one.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed]
        for volume in one.get("volumes", []):
            assert volume.partition(":")[0] in compose["volumes"]
        for config in one.get("configs", []):
            assert config["source"] in compose["configs"]
        for key, value in one.get("environment", {}).items():
            if any(word in key for word in ("PASSWORD", "SECRET", "_KEY", "MC_HOST")):
                assert str(value).count("${") and ":?" in value, f"{name}: {key} has a default"
    published = {name: one["ports"] for name, one in services.items() if "ports" in one}
    assert published == {"mlflow": ["${BIND:-127.0.0.1}:${PORT:-5000}:5000"]}
    page = (ROOT / "docs" / "server.md").read_text()
    for name in ("POSTGRES_PASSWORD", "S3_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY"):
        assert f"{name}=" in page
    told = compose["configs"]["logins"]["content"]
    kept = [line for line in server.LOGINS.splitlines() if "database" not in line]
    assert set(kept) < set(told.splitlines())


# --- real servers ---------------------------------------------------------------------------------


@pytest.fixture
def client(tmp_path) -> Path:
    """A folder of somebody who has the project and nothing else."""
    folder = tmp_path / "client"
    (folder / "projects").mkdir(parents=True)
    text = PROJECT.replace("{lanczos: {k: 2}}", "{lanczos: {k: 1, density_steps: 5}}")
    (folder / "projects" / "tiny.yaml").write_text(text + "pairs: {interpolation: {points: 5}}\n")
    return folder


LOAD = """
import json, lsa
from lsa.probe import find
checkpoint = lsa.load(optimizer="sgd", project="tiny")
gradient = checkpoint.landscape.gradient(checkpoint.theta)
print(json.dumps([len(checkpoint.theta), checkpoint.run_id, float(gradient.norm())]))
"""


def everything(client: Path, env: dict[str, str]) -> None:
    """Every kind of command, from the study to the report."""
    lsa("study", "tiny", cwd=client, env=env)
    found = json.loads(lsa("checkpoints", "--json", cwd=client, env=env).stdout)
    assert [(one["optimizer"], one["seed"]) for one in found] == [("adamw", 0), ("sgd", 0)]
    probe = ["perturbation", "--checkpoint", found[1]["run"][:10], "--points", "5"]
    run_id = lsa(*probe, cwd=client, env=env).stdout.split()[-1]
    shown = json.loads(lsa("show", run_id, "--json", cwd=client, env=env).stdout)
    assert shown["status"] == "FINISHED" and shown["artifacts"].startswith("mlflow-artifacts:/")
    loaded = forked(code=LOAD, cwd=client, env=env)
    assert json.loads(loaded.stdout)[1] == found[1]["run"]
    lsa("report", "tiny", cwd=client, env=env)
    assert (client / "report-tiny.html").read_text().count("data:image/png;base64,") == 4
    kept = {path.name for path in client.iterdir()}
    reports = {f"report-tiny.{form}" for form in ("html", "md", "json")}
    assert kept == {"projects", ".lsa", "explorer-tiny.html", *reports}
    assert not list((client / ".lsa" / "spool").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_everything_works_with_a_login_from_a_client_that_shares_no_disk(
    tmp_path, client, monkeypatch
):
    pytest.importorskip("flask_wtf", reason="flask-wtf is not installed (mlflow[auth])")
    (tmp_path / "host").mkdir()
    with Served(tmp_path / "host", "--auth", MLFLOW_AUTH_ADMIN_PASSWORD=PASSWORD) as served:
        outside = environment(MLFLOW_TRACKING_URI=served.uri)
        refused = lsa("checkpoints", cwd=client, env=outside, code=2)
        assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in refused.stderr
        assert refused.stderr.count("\n") == 1
        login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
        for name, value in login.items():
            monkeypatch.setenv(name, value)
        ann = json.dumps({"username": "ann", "password": PASSWORD}).encode()
        path = "/api/2.0/mlflow/users/create"
        assert asked(served.port, "POST", path, ("admin", PASSWORD), ann)[0] == 200
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        everything(client, outside | login | {"MLFLOW_TRACKING_USERNAME": "ann"})
        check_histories(served.uri)
        assert (tmp_path / "host" / "server" / "artifacts").is_dir()
        assert {path.name for path in (tmp_path / "host").iterdir()} == {"server", "server.log"}
        assert status(served.uri, {"Host": "evil.example"}) == 403
        assert status(served.uri, {"Origin": "https://evil.example"}) == 403
    assert PASSWORD not in served.log.read_text()


def check_histories(uri: str) -> None:
    """The server gives those of many runs at once."""
    former = store.addresses()
    store.use(uri, uri)
    try:
        trained = store.client().search_runs(store.experiments(), "tags.`lsa.step` = 'train'")
        run_id = trained[0].info.run_id
        rows = metric_histories._together([run_id], "val/loss")
        history = store.client().get_metric_history(run_id, "val/loss")
        assert rows == [(run_id, one.step, one.value) for one in history] and rows
    finally:
        store.use(*former)


def status(address: str, headers: dict[str, str]) -> int:
    """Of a request that would change something."""
    url = f"{address}/api/2.0/mlflow/experiments/create"
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, b'{"name": "x"}', {**kind, **headers}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.full
@pytest.mark.slow
def test_a_study_works_on_postgresql_whose_password_is_nowhere(tmp_path, client):
    (tmp_path / "host").mkdir()
    with postgres(PASSWORD) as address:
        wrong = environment(PGPASSWORD="wrong")
        options = ["server", "--folder", str(tmp_path / "no"), "--store", address]
        refused = lsa(*options, cwd=tmp_path, env=wrong, code=2)
        assert "password authentication failed" in refused.stderr
        with Served(tmp_path / "host", "--store", address, PGPASSWORD=PASSWORD) as served:
            assert served.process is not None
            env = environment(MLFLOW_TRACKING_URI=served.uri)
            lsa("study", "tiny", cwd=client, env=env)
            lsa("report", "tiny", cwd=client, env=env)
            every = psutil.Process(served.process.pid).children(recursive=True)
            words = [" ".join(one.cmdline()) for one in every]
            assert words and not any(PASSWORD in one for one in words)
    assert PASSWORD not in served.log.read_text()
    assert not list((tmp_path / "host").rglob("*.db"))
