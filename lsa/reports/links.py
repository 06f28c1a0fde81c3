"""Where MLflow's UI shows a run."""

from __future__ import annotations

from urllib.parse import urlsplit

from lsa.tracking import store
from lsa.tracking.runs import Done

LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` answers


def of_run(done: Done) -> str:
    """Address of a run's page; of a local store, where `mlflow ui` shows it."""
    route = f"#/experiments/{done.experiment}/runs/{done.run_id}"
    return f"{_address() if served() else LOCAL}/{route}"


def served() -> bool:
    """Whether the store is a server, with a page for every run."""
    return urlsplit(store.uri()).scheme in ("http", "https")


def _address() -> str:
    """The server's address without user and password."""
    parts = urlsplit(store.uri())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
