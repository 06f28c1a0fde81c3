"""Real servers for tests: MLflow's through `lsa server`, and PostgreSQL."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from processes import forked, started

LSA = [sys.executable, "-m", "lsa"]
STARTING = 300.0  # seconds that a server may take on a busy machine
# A server that is gone is given up after a second or two, and not after the usual minute.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
DROPPED = (
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "LSA_SPOOL",
)


def environment(**more: str) -> dict[str, str]:
    """That of a process which knows nothing of the tests' own store.

    The tests' interpreter is first on PATH, as in the README: `mlflow run` starts `python`.
    """
    kept = {k: v for k, v in os.environ.items() if k not in (*DROPPED, "MLFLOW_TRACKING_URI")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1"} | more


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Served:
    """MLflow's server through `lsa server`, which can be killed and started again."""

    def __init__(self, folder: Path, *options: str, **more: str) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self._command = [*LSA, "server", "--folder", str(folder / "server")]
        self._command += ["--port", str(self.port), "--workers", "1", *options]
        self._environment = environment(**more)
        self._stack = contextlib.ExitStack()
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Served:
        with contextlib.ExitStack() as cleaning:  # also where it does not start
            cleaning.callback(self._stack.close)
            self.start()
            cleaning.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        output = self._stack.enter_context(self.log.open("ab"))
        self.process = self._stack.enter_context(
            started(
                self._command,
                cwd=self.folder,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        )
        deadline = time.monotonic() + STARTING
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL to every process of it."""
        assert self.process is not None
        every = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        for one in every:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()


def asked(
    port: int, method: str, path: str, login: tuple[str, str], content: bytes, **headers: str
) -> tuple[int, bytes]:
    """Status and content of a server's answer; the path is sent as it is spelled."""
    secret = base64.b64encode(":".join(login).encode()).decode()
    told = {"Content-Type": "application/json", "Authorization": f"Basic {secret}", **headers}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, content, told)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def lsa(
    *arguments: str, cwd: Path, env: Mapping[str, str], code: int | None = 0, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run a command of lsa in a forked process; it must end with the exit code, if any is given."""
    done = forked(*arguments, cwd=cwd, env=env, timeout=timeout)
    said = f"lsa {' '.join(arguments)}: {done.returncode}\n{done.stderr}"
    assert code in (None, done.returncode), said
    return done


# --- PostgreSQL -----------------------------------------------------------------------------------


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's programs; Debian has them beside the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    named = shutil.which("initdb")
    return found[-1].parent if found else Path(named).parent if named else None


@contextlib.contextmanager
def postgres(password: str, user: str = "lsa", database: str = "postgres") -> Iterator[str]:
    """A new PostgreSQL with an empty database; its address without the password.

    It refuses to run as root, so root starts it as `postgres` or `nobody`.
    """
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install '.[server]')")
    folder = Path(tempfile.mkdtemp(prefix="lsa-postgres-"))
    port = free_port()
    owner = _unprivileged()
    try:
        secret = folder / "password"
        secret.write_text(password)
        if owner:
            shutil.chown(folder, owner)
            shutil.chown(secret, owner)
        settings = {"cwd": folder, "user": owner, "stdout": subprocess.DEVNULL}
        made = [programs / "initdb", "--pgdata", folder / "data", "--username", user]
        made += ["--auth", "scram-sha-256", "--pwfile", secret, "--no-sync"]
        subprocess.run(made, check=True, timeout=STARTING, **settings)
        command = [programs / "postgres", "-D", folder / "data", "-p", str(port)]
        command += ["-k", folder, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with started(command, stderr=subprocess.DEVNULL, **settings) as process:
            ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
            deadline = time.monotonic() + STARTING
            while subprocess.run(ready, stdout=subprocess.DEVNULL, check=False).returncode:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            if database != "postgres":
                made = [
                    programs / "createdb",
                    "-h",
                    "127.0.0.1",
                    "-p",
                    str(port),
                    "-U",
                    user,
                    database,
                ]
                subprocess.run(made, check=True, env=os.environ | {"PGPASSWORD": password})
            yield f"postgresql://{user}@127.0.0.1:{port}/{database}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged() -> str | None:
    import pwd

    if os.getuid():
        return None
    names = {one.pw_name for one in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
