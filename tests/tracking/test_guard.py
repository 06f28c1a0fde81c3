"""The rules of `lsa server`, tried by somebody who means to break them. Loopback only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PROJECT
from servers import Served, asked, environment, lsa

from lsa.tracking.guard import refusal

PASSWORD = "correct horse battery"
API = "/api/2.0/mlflow"
ARTIFACTS = "/api/2.0/mlflow-artifacts"
RUN = "0123456789abcdef0123456789abcdef"


# --- by the path alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", ".", "./.", "1", "1/", "1/..", f"1/{RUN}", f"./1/{RUN}/a"])
@pytest.mark.parametrize("prefix", ["/api", "/ajax-api"])
def test_what_would_delete_more_than_one_runs_files_is_refused(prefix, path):
    assert refusal("DELETE", f"{prefix}/2.0/mlflow-artifacts/artifacts/{path}")


@pytest.mark.parametrize("family", ["artifacts", "mpu/create", "mpu/complete", "mpu/abort"])
@pytest.mark.parametrize(
    "path",
    [
        f"./1/{RUN}/artifacts/a",
        f"1/./{RUN}/artifacts/a",
        f"1//{RUN}/artifacts/a",
        f"1/x/../{RUN}/artifacts/a",
        f"/1/{RUN}/artifacts/a",
        f"%31/{RUN}/artifacts/a",  # as it is after one decoding, which MLflow's second completes
        f"1/%2e%2e/2/{RUN}/artifacts/a",
        f"1/{RUN}%2fartifacts/a",
        f"file:1/{RUN}/artifacts/a",
        f"file:///1/{RUN}/artifacts/a",
    ],
)
def test_only_the_plain_path_of_an_artifact_is_one(family, path):
    method = "PUT" if family == "artifacts" else "POST"
    assert refusal(method, f"{ARTIFACTS}/{family}/{path}")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", f"{ARTIFACTS}/artifacts"),  # lists, by a parameter
        ("PUT", f"{ARTIFACTS}/artifacts/1/{RUN}/artifacts/plots/100%.png"),
        ("PUT", f"{ARTIFACTS}/artifacts/1/{RUN}/artifacts/..hidden"),
        ("DELETE", f"{ARTIFACTS}/artifacts/1/{RUN}/artifacts"),
        ("DELETE", f"{ARTIFACTS}/artifacts/1/models/m-{RUN}/artifacts"),
        ("POST", f"{ARTIFACTS}/mpu/create/1/{RUN}/artifacts"),
        ("POST", "/api/3.0/mlflow/traces/search"),
        ("POST", f"{API}/experiments/create"),
    ],
)
def test_everything_else_is_passed_on(method, path):
    assert refusal(method, path) == ""


# --- a server with logins, and one of them who attacks --------------------------------------------


@dataclass
class Attacked:
    """A server with ann's experiment, run and artifact, and bob's own."""

    port: int
    folder: Path
    experiment: str = ""
    run: str = ""
    own: str = ""  # bob's experiment

    def asked(
        self, method: str, path: str, login: str = "bob", body: object = None, **headers: str
    ) -> tuple[int, bytes]:
        """Status and content, of the path as it is."""
        content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        return asked(self.port, method, path, (login, PASSWORD), content, **headers)

    def made(self, path: str, login: str, **body: object) -> dict:
        status, content = self.asked("POST", f"{API}/{path}", login, body)
        assert status == 200, content
        return json.loads(content)

    @property
    def artifact(self) -> str:
        return f"{self.experiment}/{self.run}/artifacts/weights"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory) -> Iterator[Attacked]:
    pytest.importorskip("flask_wtf", reason="flask-wtf is not installed (mlflow[auth])")
    folder = tmp_path_factory.mktemp("host")
    with Served(folder, "--auth", MLFLOW_AUTH_ADMIN_PASSWORD=PASSWORD) as served:
        made = Attacked(served.port, folder)
        for name in ("ann", "bob"):
            made.made("users/create", "admin", username=name, password=PASSWORD)
        made.experiment = made.made("experiments/create", "ann", name="anns")["experiment_id"]
        run = made.made("runs/create", "ann", experiment_id=made.experiment)["run"]["info"]
        made.run = run["run_id"]
        made.own = made.made("experiments/create", "bob", name="bobs")["experiment_id"]
        made.made("registered-models/create", "ann", name="anns")
        made.made("registered-models/create", "bob", name="bobs")
        where = f"{ARTIFACTS}/artifacts/{made.artifact}"
        assert made.asked("PUT", where, "ann", b"of ann")[0] == 200
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    "spelled",
    [
        "{0}", "./{0}", "%2e/{0}", "%252e/{0}", "/{0}", "%2f{0}", "x/../{0}", "x/%2e%2e/{0}",
        "{own}/../{0}", "{own}/%2e%2e/{0}", "{own}%2f..%2f{0}", "file:{0}", "file:///{0}",
        "{0}/.", "{0}%00",
    ],
)  # fmt: skip
def test_nobody_overwrites_or_deletes_what_another_login_has_kept(attacked, spelled):
    path = spelled.format(attacked.artifact, own=attacked.own)
    for method, family in (
        ("PUT", "api/2.0/mlflow-artifacts/artifacts"),
        ("PUT", "ajax-api/2.0/mlflow-artifacts/artifacts"),
        ("DELETE", "api/2.0/mlflow-artifacts/artifacts"),
        ("POST", "api/2.0/mlflow-artifacts/mpu/create"),
        ("POST", "api/2.0/mlflow-artifacts/mpu/complete"),
        ("POST", "ajax-api/2.0/mlflow-artifacts/mpu/abort"),
    ):
        body = b"of bob" if method == "PUT" else {"path": "weights", "upload_id": "x", "parts": []}
        status, content = attacked.asked(method, f"/{family}/{path}", body=body)
        assert 400 <= status < 500, (method, family, status, content)
    assert attacked.asked("GET", f"{ARTIFACTS}/artifacts/{attacked.artifact}")[1] == b"of ann"


@pytest.mark.slow
@pytest.mark.parametrize("path", [".", "%2e", "%252e", "./", "", "{0}", "{0}/", "{0}/{1}", "x/.."])
@pytest.mark.parametrize("login", ["ann", "bob", "admin"])
def test_nobody_deletes_all_artifacts_at_once(attacked, path, login):
    named = path.format(attacked.experiment, attacked.run)
    status, _ = attacked.asked("DELETE", f"{ARTIFACTS}/artifacts/{named}", login)
    assert 400 <= status < 500
    assert attacked.asked("GET", f"{ARTIFACTS}/artifacts/{attacked.artifact}")[1] == b"of ann"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=weights", b"of bob"),
        ("POST", f"{API}/artifacts/presigned-upload-url", {"run_id": "{run}", "path": "weights"}),
        ("POST", f"{API}/runs/set-tag", {"run_id": "{run}", "key": "k", "value": "v"}),
        ("POST", f"{API}/runs/log-metric", {"run_id": "{run}", "key": "m", "value": 1}),
        ("POST", f"{API}/runs/update", {"run_id": "{run}", "status": "FAILED"}),
        ("POST", f"{API}/runs/delete", {"run_id": "{run}"}),
        ("POST", f"{API}/runs/create", {"experiment_id": "{experiment}"}),
        ("POST", f"{API}/logged-models", {"experiment_id": "{experiment}", "name": "m"}),
        ("POST", f"{API}/experiments/delete", {"experiment_id": "{experiment}"}),
        ("POST", f"{API}/experiments/update", {"experiment_id": "{experiment}", "new_name": "b"}),
        ("POST", f"{API}/model-versions/create", {"name": "anns", "source": "models:/m-1"}),
        ("POST", f"{API}/registered-models/set-tag", {"name": "anns", "key": "k", "value": "v"}),
        ("DELETE", f"{API}/registered-models/delete", {"name": "anns"}),
        ("POST", f"{API}/users/create", {"username": "eve", "password": PASSWORD}),
        ("PATCH", f"{API}/users/update-password", {"username": "ann", "password": PASSWORD}),
        ("PATCH", f"{API}/users/update-admin", {"username": "bob", "is_admin": True}),
    ],
)
def test_what_a_login_has_made_is_changed_by_no_other(attacked, method, path, body):
    named = {"run": attacked.run, "experiment": attacked.experiment}
    if isinstance(body, dict):
        body = {k: v.format(**named) if isinstance(v, str) else v for k, v in body.items()}
    assert attacked.asked(method, path.format(**named), body=body)[0] == 403


@pytest.mark.slow
@pytest.mark.parametrize("login", ["bob", "admin"])
@pytest.mark.parametrize(
    "location", ["file://{0}", "{0}", "file:{0}", "mlflow-artifacts:/1", "s3://other/x", "a/b"]
)
def test_no_experiment_is_kept_where_a_client_says(attacked, tmp_path, login, location):
    outside = location.format(tmp_path / "outside")
    body = {"name": f"{login} {location}", "artifact_location": outside}
    twice = json.dumps(json.dumps(body)).encode()  # as clients of old sent it
    camel = {"name": body["name"], "artifactLocation": outside}
    for content in (body, twice, camel):
        status, answer = attacked.asked("POST", f"{API}/experiments/create", login, content)
        assert status == 400 and b"leave it out" in answer
    assert not (tmp_path / "outside").exists()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["file:///etc", "/etc", "file:etc", "s3://other/x", ""])
def test_no_model_is_of_files_outside_the_server(attacked, source):
    body = {"name": "bobs", "source": source}
    status, answer = attacked.asked("POST", f"{API}/model-versions/create", body=body)
    assert status == 400 and b"source=" in answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{API}/traces"),
        ("POST", "/ajax-api/3.0/mlflow/traces"),
        ("PATCH", "/api/3.0/mlflow/traces/tr-1/tags"),
        ("POST", "/v1/traces"),
        ("GET", "/ajax-api/3.0/mlflow/assistant/config"),
        ("POST", "/ajax-api/3.0/mlflow/assistant/message"),
    ],
)
def test_what_reaches_into_the_machine_is_off(attacked, method, path):
    status, answer = attacked.asked(method, path, "admin")
    assert status == 400 and b" off: " in answer


@pytest.mark.slow
def test_a_login_reads_everything_and_works_in_what_is_its_own(attacked):
    where = f"{ARTIFACTS}/artifacts/{attacked.artifact}"
    assert attacked.asked("GET", where) == (200, b"of ann")
    run = attacked.made("runs/create", "bob", experiment_id=attacked.own)["run"]["info"]["run_id"]
    for content in (b"first", b"second"):
        own = f"{ARTIFACTS}/artifacts/{attacked.own}/{run}/artifacts"
        assert attacked.asked("PUT", f"{own}/a", body=content)[0] == 200
        assert attacked.asked("GET", f"{own}/a")[1] == content
    assert attacked.asked("DELETE", own)[0] == 200
    assert attacked.asked("GET", f"{own}/a")[0] == 404


@pytest.mark.slow
def test_who_made_an_experiment_lets_others_in(attacked):
    shared = attacked.made("experiments/create", "ann", name="shared")["experiment_id"]
    attempt = ("POST", f"{API}/runs/create", "bob", {"experiment_id": shared})
    assert attacked.asked(*attempt)[0] == 403
    grant = {"username": "bob", "resource_type": "experiment", "resource_id": shared}
    path = "/api/3.0/mlflow/users/permissions/grant"
    assert attacked.asked("POST", path, "bob", {**grant, "permission": "EDIT"})[0] == 403
    assert attacked.asked("POST", path, "ann", {**grant, "permission": "EDIT"})[0] == 200
    assert attacked.asked(*attempt)[0] == 200


@pytest.mark.slow
def test_a_login_that_may_not_write_is_told_in_one_line(attacked, tmp_path):
    attacked.made("experiments/create", "ann", name="tiny")
    (tmp_path / "tiny.yaml").write_text(PROJECT)
    env = environment(
        MLFLOW_TRACKING_URI=f"http://127.0.0.1:{attacked.port}",
        MLFLOW_TRACKING_USERNAME="bob",
        MLFLOW_TRACKING_PASSWORD=PASSWORD,
    )
    told = lsa(
        "train", "--project", "tiny.yaml", "--optimizer", "sgd", cwd=tmp_path, env=env, code=2
    )
    assert "does not let this login write there" in told.stderr and told.stderr.count("\n") == 1


@pytest.mark.slow
def test_without_a_login_nothing_is_read(attacked):
    for path in (
        f"{API}/experiments/get?experiment_id=0",
        f"{ARTIFACTS}/artifacts/{attacked.artifact}",
        f"{ARTIFACTS}/artifacts?path={attacked.experiment}",
        "/",
    ):
        for login in ("nobody", ""):
            assert attacked.asked("GET", path, login)[0] == 401


@pytest.mark.slow
def test_other_users_of_the_machine_read_nothing(attacked):
    kept = [path for path in (attacked.folder / "server").rglob("*") if path.is_file()]
    names = {path.name for path in kept}
    assert names >= {"mlflow.db", "logins.db", "logins.ini", "session.key", "weights"}
    assert not [path for path in kept if path.stat().st_mode & 0o077]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{0}", 200),
        ("localhost:{0}", 200),
        ("LOCALHOST", 200),
        ("LocalHost:{0}", 200),
        ("[::1]", 200),
        ("[::1]:{0}", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("[::2]:{0}", 403),
        (":", 403),
    ],
)
def test_a_host_is_one_however_it_is_spelled(attacked, host, status):
    path = f"{API}/experiments/get?experiment_id=0"
    assert attacked.asked("GET", path, Host=host.format(attacked.port))[0] == status


# --- a server without logins ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.full
def test_without_logins_the_same_rules_hold(tmp_path):
    with Served(tmp_path) as served:
        open_ = Attacked(served.port, tmp_path)
        where = f"{ARTIFACTS}/artifacts/0/{RUN}/artifacts/a"
        assert open_.asked("PUT", where, body=b"kept")[0] == 200
        for path in (".", "%2e", "%252e", "", "0", "0/", f"0/{RUN}", "0/.."):
            assert 400 <= open_.asked("DELETE", f"{ARTIFACTS}/artifacts/{path}")[0] < 500
        assert open_.asked("GET", where) == (200, b"kept")
        body = {"name": "x", "artifact_location": f"file://{tmp_path}/outside"}
        assert open_.asked("POST", f"{API}/experiments/create", body=body)[0] == 400
        assert open_.asked("POST", f"{API}/experiments/create", body={"name": "x"})[0] == 200
        assert open_.asked("DELETE", where.removesuffix("/a"))[0] == 200
