"""MLflow's own tracking server, started with settings for people who share one.

A folder holds all of it: the database `mlflow.db`, the runs' files, and with logins their database
and keys. What is secret is passed on in the environment, so that no list of processes shows it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import sqlalchemy
from sqlalchemy.exc import ArgumentError, DBAPIError

from lsa.runtime.errors import InputError
from lsa.tracking import address, attached

STORE = "MLFLOW_BACKEND_STORE_URI"  # MLflow's own variable, for an address with a password
PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"  # the same, of the first user
SECRET = "MLFLOW_FLASK_SERVER_SECRET_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANYWHERE = ("0.0.0.0", "::")
SHORTEST = 12  # characters of a password; MLflow's rule
# A login may read everything, and write into what it has made or was let into. A password that was
# right is so for a minute: checking one is slow by design, and comes with every request.
LOGINS = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/logins.db
admin_username = admin
auth_cache_ttl_seconds = 60
"""


@dataclass(frozen=True)
class Server:
    """Options of a server."""

    folder: Path
    store: str = ""  # address of a database, in place of the folder's
    artifacts: str = ""  # s3://… or a folder, in place of the folder's
    host: str = "127.0.0.1"
    port: int = 5000
    allowed_hosts: tuple[str, ...] = ()  # names by which clients call it, beside its own
    origins: tuple[str, ...] = ()  # of web pages that may call it, beside its own
    auth: bool = False
    workers: int = 2


def serve(server: Server) -> NoReturn:
    """Replace this process by the server.

    Raises:
        InputError: It cannot start; says why.
    """
    hosts = allowed(server)
    _check_port(server)
    if urlsplit(server.store).password:
        raise InputError(
            f"store={address.shown(server.store)}: a password on the command line is seen by "
            f"everyone on the machine; set {STORE} instead, or leave it out and set PGPASSWORD"
        )
    if server.auth:
        os.umask(0o077)  # what the server writes is not for this machine's other users
    server.folder.mkdir(parents=True, exist_ok=True)
    logins = _logins(server.folder) if server.auth else {}
    store_uri = _store(server)
    environment = {
        **os.environ,
        **logins,
        STORE: store_uri,
        "MLFLOW_ARTIFACTS_DESTINATION": server.artifacts or str(server.folder / "artifacts"),
        "MLFLOW_SERVE_ARTIFACTS": "true",
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(hosts),
        # Jobs are for judging language models; they would take more processes than the server.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if server.origins:
        environment["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(server.origins)
    for name in (address.TRACKING_URI, address.REGISTRY_URI, attached.RUN_ID):
        environment.pop(name, None)
    os.chdir(server.folder)  # MLflow writes beside where it runs
    os.execve(sys.executable, _command(server), environment)


def _command(server: Server) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", server.host]
    command += ["--port", str(server.port), "--workers", str(server.workers)]
    command += ["--uvicorn-opts", "--log-level warning"]  # not a line for every request
    return [*command, "--app-name", "lsa-with-logins" if server.auth else "lsa"]


def allowed(server: Server) -> list[str]:
    """Values of the Host header that are answered: no other site's name leads to the server.

    Raises:
        InputError: Clients on other machines call it by a name that is not given.
    """
    if server.host in ANYWHERE and not server.allowed_hosts:
        raise InputError(
            f"host={server.host} is reached under several names; give those by which clients call "
            "it: allowed_hosts=mlflow.example.org,10.0.0.5"
        )
    own = [] if server.host in (*ANYWHERE, *LOOPBACK) else [server.host]
    named = [*own, *server.allowed_hosts, "127.0.0.1", "localhost", "::1"]
    return [form for name in named for form in _with_port(in_address(name.lower()))]


def in_address(host: str) -> str:
    """A host as it stands in an address: IPv6 in brackets."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host


def _with_port(name: str) -> tuple[str, ...]:
    """A host as it is and on any port, unless a port or pattern is given."""
    given = name.rpartition("]")[2] if name.startswith("[") else name
    if ":" in given or "*" in name:
        return (name,)
    return name, name.replace("[", "[[]") + ":*"  # a pattern, where [ alone begins a set


def _check_port(server: Server) -> None:
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((server.host, server.port))
        except OSError as error:
            raise InputError(
                f"cannot listen on {server.host}:{server.port} ({error.strerror or error}); "
                "give another host=… or port=…"
            ) from None


def _store(server: Server) -> str:
    """The database's address; a new SQLite one made whole.

    Raises:
        InputError: It is not reached.
    """
    uri = server.store or os.environ.get(STORE) or address.of_file(server.folder / "mlflow.db")
    # With its driver, since which one is meant without depends on SQLAlchemy's version.
    uri = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", uri)
    try:
        if not uri.startswith("sqlite:"):  # MLflow's own tries would go on for minutes
            sqlalchemy.create_engine(uri).connect().close()
    except (DBAPIError, ArgumentError) as error:
        why = " ".join(str(getattr(error, "orig", None) or "not an address").split())
        raise InputError(f"cannot reach the store {address.shown(uri)}: {why}") from None
    path = address.file_of(uri)
    if path and not path.exists():
        from lsa.tracking import store  # imports MLflow, which this process does not need otherwise

        # The server keeps the files, also those of the experiment that is there from the start.
        store.create(path, "mlflow-artifacts:/")
    return uri


def _logins(folder: Path) -> dict[str, str]:
    """Files and variables that MLflow's login needs, made in the folder at the first start.

    Raises:
        InputError: A package or the first password is missing.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        raise InputError("auth needs the package flask-wtf; pip install 'mlflow[auth]'")
    first = os.environ.get(PASSWORD, "")
    if len(first) < SHORTEST and not (folder / "logins.db").exists():
        raise InputError(
            f"auth needs the first password of the user admin, of at least {SHORTEST} characters; "
            f"set {PASSWORD}"
        )
    if (folder / "logins.db").exists():
        (folder / "logins.db").chmod(0o600)
    settings, key = folder / "logins.ini", folder / "session.key"
    for path, content in (
        (settings, LOGINS.format(folder=folder)),
        (key, secrets.token_hex(32)),
    ):
        if not path.exists():
            with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
                file.write(content)
    return {"MLFLOW_AUTH_CONFIG_PATH": str(settings), SECRET: key.read_text()}
