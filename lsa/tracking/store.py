"""The tracking store: where it is, a client of it, and a new one made whole."""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.exceptions import MlflowException, RestException

from lsa.runtime import locks, signals
from lsa.runtime.errors import InputError, without_passwords

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # we draw our own
# Waits of 0, 4, 8, 16 and 32 s between its tries: longer than a server takes to start again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
# Through the server: else it sends clients to its S3 storage, which they may not reach.
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for every try
logging.getLogger("mlflow").setLevel(logging.ERROR)
# It writes every error of the database, which is raised as well, with parameters and traceback.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.ERROR)

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # whose tables MLflow makes at first use
AT_ONCE = 8  # questions that are asked of it at once, where there is one for each run
PAUSE = 30.0  # seconds in which a store that did not answer is not asked again
_silent_until = 0.0
T = TypeVar("T")


def uri() -> str:
    """The tracking store's address as MLflow sees it."""
    return mlflow.get_tracking_uri()


def addresses() -> tuple[str, str]:
    """Addresses of the tracking store and of the model registry, for another process."""
    return uri(), mlflow.get_registry_uri()


def use(tracking: str, registry: str) -> None:
    """Use these from here on."""
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(registry)


def shown(uri: str) -> str:
    """The address without the password that it may hold."""
    return without_passwords(uri)


def client() -> mlflow.MlflowClient:
    """A client of the store in use."""
    tracking, registry = addresses()
    _prepare(tracking)
    if registry.startswith(DATABASES):
        _prepare(registry)
    return mlflow.MlflowClient() if _is_served(uri()) else _Uninterrupted()


class _Uninterrupted(mlflow.MlflowClient):
    """A database's client, whose calls no signal cuts short.

    SQLAlchemy gives a connection up when an exception that is not an error comes in its statement,
    but SQLite keeps its lock until nothing refers to the statement any more, and the traceback
    does: the run could not be ended for as long as its process lives.
    """

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        @functools.wraps(found)
        def whole(*arguments: Any, **options: Any) -> Any:
            with signals.held():
                return found(*arguments, **options)

        return whole


def _is_served(uri: str) -> bool:
    """Whether a server stands between this process and the database."""
    return uri.startswith(("http", "databricks"))


@functools.lru_cache(maxsize=4)
def _prepare(uri: str) -> None:
    """Make a new database's tables, one process at a time: MLflow's own two would collide."""
    if not _is_served(uri):
        with locks.claim(uri, "tables"):
            path = Path(uri.removeprefix("sqlite:///"))
            if uri.startswith("sqlite:///") and "?" not in uri and not path.exists():
                make_whole(path)
            mlflow.MlflowClient(uri).search_experiments(max_results=1)


def make_whole(path: Path, artifacts: str | None = None) -> None:
    """A new SQLite store, there only when it is complete.

    MLflow cannot open one whose making was cut short, nor finish it.

    Args:
        path: Of the database.
        artifacts: Root of the files, in place of MLflow's own choice.
    """
    folder = path.with_name(f".{path.name}.new")
    shutil.rmtree(folder, ignore_errors=True)  # what a process left that was killed here
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot make the store {path}: {error.strerror or error}") from None
    new = folder / path.name
    if artifacts:
        # Here, since a client of a server need not wait the second that its import takes.
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(f"sqlite:///{new}", artifacts)
    else:
        mlflow.MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
    if not path.exists():  # else another program was faster
        new.replace(path)
    shutil.rmtree(folder)


def away(error: BaseException) -> bool:
    """Whether an error says that the store did not answer, as against refusing what was asked."""
    if not isinstance(error, MlflowException):
        return False
    if error.error_code == "TEMPORARILY_UNAVAILABLE":
        return True
    return not isinstance(error, RestException) and "failed with exception" in str(error)


def barred(error: BaseException) -> bool:
    """Whether the store asks for another name or password."""
    return isinstance(error, MlflowException) and bool(re.search(r"\b401\b", str(error)))


def explained(error: BaseException) -> str:
    """A store's error in one line."""
    first = (str(error).splitlines() or [""])[0]
    if away(error):
        cause = re.search(r"(?<=\] )[\w ]+|timed out|too many \d+ error responses", first)
        why = f" ({cause[0]})" if cause else ""
        return f"the store {shown(uri())} does not answer{why}"
    if barred(error):
        return (
            f"the store {shown(uri())} does not let you in; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    return f"the store {shown(uri())} refuses: {shown(first)}"


def ask(question: Callable[[], T], otherwise: T, *, anyway: bool = False) -> T:
    """The store's answer; `otherwise` where it does not answer, or did not a moment ago.

    Args:
        question: Asks it.
        otherwise: In place of the answer.
        anyway: Ask also if it did not answer a moment ago.
    """
    global _silent_until
    if time.monotonic() < _silent_until and not anyway:
        return otherwise
    try:
        return question()
    except MlflowException as error:
        if not away(error):
            raise
        _silent_until = time.monotonic() + PAUSE
        return otherwise


def experiments() -> list[str]:
    """Ids of all experiments."""
    return [e.experiment_id for e in client().search_experiments()]


def quoted(value: str) -> str:
    """A value that cannot leave its quotes in a search filter."""
    if "'" in value or "\\" in value:
        raise InputError(f"{value!r} holds a quote or backslash; no name or ID here does")
    return value
