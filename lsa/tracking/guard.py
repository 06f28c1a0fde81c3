"""Rules that lsa's server adds to MLflow's, for every client, with a login or without.

MLflow lets a client choose where the server keeps the files of an experiment, a model version or a
trace of a language model: `file:///…` is any folder of the server's machine. It deletes every
artifact when it is asked for `artifacts/.`, and its assistant runs commands on that machine. All of
this is refused here.

`mlflow server --app-name` starts the two applications by the names in pyproject.toml.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.protos.model_registry_pb2 import CreateModelVersion
from mlflow.protos.service_pb2 import CreateExperiment
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

ARTIFACTS = re.compile(
    r"/(?:ajax-)?api/2\.0/mlflow-artifacts/(?:artifacts|mpu/[^/]*|presigned)/(.*)", re.DOTALL
)
# A new trace, and new tags of one: two of them are addresses of its files.
TRACES = re.compile(
    r"POST (?:/v1/traces|/(?:ajax-)?api/\d\.0/mlflow/traces)/?|PATCH .*/mlflow/traces/.*", re.DOTALL
)
# A run's files lie in <experiment>/<run>/artifacts, a model's in <experiment>/models/<model>.
DEEPEST_SHARED = 2  # parts of a path that several runs or models may have in common
SOURCES = ("mlflow-artifacts", "models", "runs")  # what the server itself keeps


def guarded(app: ASGIApp) -> ASGIApp:
    """An application that answers what the rules refuse and passes the rest on to `app`."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        chosen = app
        if scope["type"] == "http":
            scope = {**scope, "headers": list(map(_lower_host, scope["headers"]))}
            if why := refusal(scope["method"], scope["path"]):
                content = {"error_code": "INVALID_PARAMETER_VALUE", "message": why}
                chosen = JSONResponse(content, status_code=400)
        await chosen(scope, receive, send)

    return answer


def _lower_host(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """The header; a host in small letters, since names of hosts do not distinguish them."""
    name, value = header
    return (name, value.lower()) if name == b"host" else header


def refusal(method: str, path: str) -> str:
    """Reason for refusing a request's path; empty for an allowed one."""
    if "/mlflow/assistant" in path:
        return "the assistant is off: it would run commands on the server's machine"
    if TRACES.fullmatch(f"{method} {path}"):
        return "traces are off: their tags could name any folder of the server's machine"
    named = ARTIFACTS.fullmatch(path)
    if named is None:
        return ""
    parts = named[1].split("/")
    # MLflow decodes a path once more, and takes file:x for x.
    if unquote(named[1]) != named[1] or ":" in parts[0] or {"", ".", ".."} & set(parts):
        return f"{named[1]!r} is not the plain path of an artifact: <experiment>/<run>/artifacts/…"
    if method == "DELETE" and len(parts) <= DEEPEST_SHARED:
        return f"{named[1]!r} holds the artifacts of several runs; delete those of one at a time"
    return ""


def refuse_locations() -> None:
    """Refuse the request that Flask is answering if it names a location outside the server's own.

    Raises:
        MlflowException: It does.
    """
    from flask import request
    from mlflow.server.handlers import _get_request_message  # reads what the handler will read

    kind = request.path.partition("/mlflow/")[2]
    if kind == "experiments/create":
        if location := _get_request_message(CreateExperiment()).artifact_location:
            raise _refused("artifact_location", location, "the server keeps them; leave it out")
    elif kind == "model-versions/create":
        source = _get_request_message(CreateModelVersion()).source
        if urlsplit(source).scheme not in SOURCES:
            rule = "a model's files are those of a run or model of this server"
            raise _refused("source", source, rule)


def _refused(name: str, value: str, rule: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(f"{name}={value!r}: {rule}")


def without_logins() -> ASGIApp:
    """MLflow's server behind the rules."""
    from mlflow.server import app, handlers  # importing it makes a server of this process
    from mlflow.server.fastapi_app import create_fastapi_app

    app.before_request(handlers.catch_mlflow_exception(refuse_locations))
    return guarded(create_fastapi_app(app))


def with_logins() -> ASGIApp:
    """MLflow's server that asks for logins, behind the rules."""
    from mlflow.server import app, handlers
    from mlflow.server.auth import create_app

    with FileLock("logins.lock"):  # one worker makes the database, in the server's folder
        served = cast("ASGIApp", create_app(app))  # Flask's under other servers than uvicorn
    app.before_request(handlers.catch_mlflow_exception(refuse_locations))
    return guarded(served)
