"""The tracking store: where it is, a client of it, and a new one made whole."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from pathlib import Path

import mlflow

from lsa import claims
from lsa.errors import InputError, without_passwords

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # we draw our own
logging.getLogger("mlflow").setLevel(logging.ERROR)
# It writes every error of the database, which is raised as well, with parameters and traceback.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.ERROR)


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
    _prepare(uri())
    return mlflow.MlflowClient()


@functools.lru_cache(maxsize=4)
def _prepare(uri: str) -> None:
    """Make a new database's tables, one process at a time: MLflow's own two would collide."""
    if not uri.startswith(("http", "databricks")):
        with claims.claim(uri, "tables"):
            path = Path(uri.removeprefix("sqlite:///"))
            if uri.startswith("sqlite:///") and "?" not in uri and not path.exists():
                _make_whole(path)
            mlflow.MlflowClient().search_experiments(max_results=1)


def _make_whole(path: Path) -> None:
    """A new SQLite store, there only when it is complete.

    MLflow cannot open one whose making was cut short, nor finish it.
    """
    folder = path.with_name(f".{path.name}.new")
    shutil.rmtree(folder, ignore_errors=True)  # what a process left that was killed here
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot make the store {path}: {error.strerror or error}") from None
    new = folder / path.name
    mlflow.MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
    if not path.exists():  # else another program was faster
        new.replace(path)
    shutil.rmtree(folder)


def experiments() -> list[str]:
    """Ids of all experiments."""
    return [e.experiment_id for e in client().search_experiments()]


def quoted(value: str) -> str:
    """A value that cannot leave its quotes in a search filter."""
    if "'" in value or "\\" in value:
        raise InputError(f"{value!r} holds a quote or backslash; no name or ID here does")
    return value
