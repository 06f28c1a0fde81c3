"""MLflow's variables and loggers as lsa needs them, from the first use of a store on.

In a process of lsa's own, a command or a worker, they stay. A call of the Python interface gives
the caller's back when it ends, and an import changes none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

RETRIES, TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
VARIABLES = {  # where the user has set none
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # we draw our own
    # Waits of 0, 4, 8, 16 and 32 s between its tries: longer than a server takes to start again.
    RETRIES: "5",
    TIMEOUT: "60",
    # Through the server: else it sends clients to its S3 storage, which they may not reach.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
LEVELS = {
    "urllib3.connectionpool": logging.ERROR,  # a line for every try
    # It writes every error of the database, which is raised as well, with parameters and traceback.
    "mlflow.store.db.utils": logging.CRITICAL,
    "alembic": logging.ERROR,
}

_lock = threading.Lock()
_calls = 0  # of the Python interface that have not ended, in all threads
_applied, _borrowed = False, False  # borrowed: until those calls have ended
_added: list[str] = []
_levels: dict[str, int] = {}


def quiet() -> None:
    """Let MLflow log errors only; commands print what a user needs."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")


def answer_soon() -> None:
    """Give a store that does not answer up early, for a command that examines it."""
    os.environ.setdefault(RETRIES, "1")
    os.environ.setdefault(TIMEOUT, "10")


def apply() -> None:
    """Set what the user has not set, unless that is done; MLflow has been imported."""
    global _applied, _borrowed
    with _lock:
        if _applied:
            return
        _applied, _borrowed = True, _calls > 0
        _added[:] = [name for name in VARIABLES if name not in os.environ]
        os.environ.update({name: VARIABLES[name] for name in _added})
        for name, level in LEVELS.items():
            _levels[name] = logging.getLogger(name).level
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """A call of the Python interface: what it applies is taken back when the last one ends."""
    global _calls
    with _lock:
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if _borrowed and not _calls:
                _take_back()


def _take_back() -> None:
    """Restore the caller's settings, except those that the caller has set meanwhile."""
    global _applied, _borrowed
    _applied = _borrowed = False
    for name in _added:
        if os.environ.get(name) == VARIABLES[name]:
            del os.environ[name]
    for name, level in _levels.items():
        if logging.getLogger(name).level == LEVELS[name]:
            logging.getLogger(name).setLevel(level)
