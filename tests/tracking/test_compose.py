"""compose.yaml with its services played by programs at hand: commands, settings and order are its.

PostgreSQL is Debian's, the storage is moto's S3, MLflow is this environment's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT
from processes import started
from servers import STARTING, environment, free_port, lsa, postgres

ROOT = Path(__file__).parents[2]
SECRETS = {
    "POSTGRES_PASSWORD": "a password of postgres",
    "S3_USER": "lsa",
    "S3_PASSWORD": "a password of the storage",
    "MLFLOW_ADMIN_PASSWORD": "a password of the admin",
    "MLFLOW_SECRET_KEY": "a long random text",
}


def test_what_is_not_set_is_refused_and_defaults_are_taken():
    assert filled("${A:?set it} and ${B:-b}", {"A": "a"}) == "a and b"
    with pytest.raises(KeyError):
        filled("${A:?set it}", {})


def filled(text: str, env: dict[str, str]) -> str:
    """A value of the file as Compose reads it, `${NAME:?message}` and `${NAME:-default}`."""

    def value(found: re.Match) -> str:
        name, default = found["name"], found["default"]
        return env[name] if default is None else env.get(name, default)

    return re.sub(r"\$\{(?P<name>\w+)(?::\?[^}]*|:-(?P<default>[^}]*))\}", value, text)


@pytest.mark.full
def test_a_team_works_on_what_the_compose_file_starts(tmp_path):
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    with postgres(SECRETS["POSTGRES_PASSWORD"], user="mlflow", database="mlflow") as address:
        database, storage, port = address.rpartition("@")[2].partition("/")[0], *free_ports()
        # What Compose's network would call by name.
        places = {"@postgres/": f"@{database}/", "storage:9000": f"127.0.0.1:{storage}"}
        places |= {"/logins.ini": str(tmp_path / "logins.ini")}

        def told(text: str) -> str:
            for name, place in places.items():
                text = text.replace(name, place)
            return filled(text, SECRETS)

        logins = yaml.safe_load((ROOT / "compose.yaml").read_text())["configs"]["logins"]
        (tmp_path / "logins.ini").write_text(told(logins["content"]))
        settings = {k: told(str(v)) for k, v in services["mlflow"]["environment"].items()}
        command = services["mlflow"]["command"]
        assert command[:6] == ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]
        program = str(Path(sys.executable).parent / "mlflow")
        command = [program, "server", "--host", "127.0.0.1", "--port", str(port), *command[6:]]
        moto = [sys.executable, "-m", "moto.server", "--port", str(storage)]
        quiet: dict[str, Any] = {"cwd": tmp_path, "stderr": subprocess.STDOUT}
        with (
            (tmp_path / "log").open("wb") as log,
            started(moto, env=environment(), stdout=log, **quiet) as played,
        ):
            bucket = boto3.session.Session(
                settings["AWS_ACCESS_KEY_ID"],
                settings["AWS_SECRET_ACCESS_KEY"],
                region_name=settings["AWS_DEFAULT_REGION"],
            ).resource("s3", endpoint_url=settings["MLFLOW_S3_ENDPOINT_URL"])
            bucket = bucket.Bucket("mlflow")
            wait_until(lambda: bucket.create(), played)
            with started(command, env=environment(**settings), stdout=log, **quiet) as server:
                check = services["mlflow"]["healthcheck"]["test"]
                assert check[:3] == ["CMD", "python", "-c"]
                health = check[3].replace("5000", str(port))
                wait_until(
                    lambda: subprocess.run([sys.executable, "-c", health], check=True), server
                )
                files = worked(tmp_path, port, bucket)
        assert {Path(name).suffix for name in files} >= {".safetensors", ".json", ".png"}
        logged = (tmp_path / "log").read_text()
        assert not any(value in logged for key, value in SECRETS.items() if key != "S3_USER")
        assert "PUT /mlflow/" in logged  # the storage's own lines are among them
        assert "X-Amz-Signature" not in logged  # no client is sent there, where it cannot come


def worked(folder: Path, port: int, bucket: Any) -> list[str]:
    """The files in the bucket after a client's study and report."""
    client = folder / "client"
    (client / "projects").mkdir(parents=True)
    (client / "projects" / "tiny.yaml").write_text(PROJECT)
    outside = environment(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}")
    assert (
        "set MLFLOW_TRACKING_USERNAME" in lsa("checkpoints", cwd=client, env=outside, code=2).stderr
    )
    outside |= {"MLFLOW_TRACKING_USERNAME": "admin"}
    outside |= {"MLFLOW_TRACKING_PASSWORD": SECRETS["MLFLOW_ADMIN_PASSWORD"]}
    lsa("study", "tiny", cwd=client, env=outside)
    lsa("report", "tiny", cwd=client, env=outside)
    assert not (client / "mlruns").exists() and not list((client / ".lsa" / "spool").iterdir())
    return [one.key for one in bucket.objects.all()]


def wait_until(works: Any, process: subprocess.Popen) -> None:
    """Try until it raises no more; the process must live."""
    deadline = time.monotonic() + STARTING
    while True:
        try:
            works()
        except Exception:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        else:
            return


def free_ports() -> tuple[int, int]:
    return free_port(), free_port()
