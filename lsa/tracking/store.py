"""The tracking store: where it is, a client of it, and a new one made whole."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.exceptions import MlflowException, RestException

from lsa.runtime import failures, locks, signals
from lsa.runtime.errors import InputError, first_line
from lsa.runtime.failures import DATABASE
from lsa.tracking import address, settings
from lsa.tracking.address import DATABASES, is_served, shown

AT_ONCE = 8  # questions that are asked of it at once, where there is one for each run
PAUSE = 30.0  # seconds in which a store that did not answer is not asked again
TRIES = 3  # of what failed since an answer was cut off or lost
# Beginnings of the client's calls that change nothing, or nothing more when they come twice.
REPEATABLE = ("get_", "search_", "list_", "log_batch", "log_artifact", "set_", "update_run")
REGISTERS = re.compile("registered_model|model_version")  # in the names of those to the registry
CUT = re.compile(r"Connection broken|IncompleteRead")  # in the text of what MLflow wraps
# Of a database, to what MLflow sent again since the answer to the first was lost.
TWICE = re.compile(r"(?i)unique constraint|duplicate (key|entry)")
NO_ANSWER = re.compile(r"failed with (timeout )?exception|too many \d+ error")
_silent_until: dict[str, float] = {}  # address of a store → when it is asked again
T = TypeVar("T")


def uri() -> str:
    """The tracking store's address.

    Raises:
        InputError: None is set, and the current folder's name cannot stand in one.
    """
    address_given = mlflow.get_tracking_uri()
    if not mlflow.is_tracking_uri_set() and address.decoded(address_given) != address_given:
        # For MLflow's own calls too, which would make a folder of the encoded name.
        mlflow.set_tracking_uri(address.decoded(address_given))
    return mlflow.get_tracking_uri()


def identity() -> str:
    """A name of the store in use, the same for all of its addresses."""
    return address.canonical(uri())


def step_name(key: str) -> str:
    """File name of what belongs to a step of the store in use, by the step's key."""
    return address.step_name(uri(), key)


def registry() -> str:
    """The model registry's address: the tracking store's, unless the user has set another."""
    return mlflow.get_registry_uri()


def addresses() -> tuple[str, str]:
    """Addresses of the tracking store and of the model registry, for another process."""
    return uri(), registry()


def where() -> str:
    """The store's address for messages, with the registry's if it is another."""
    tracking, registered = addresses()
    apart = address.canonical(tracking) != address.canonical(registered)
    return shown(tracking) + (f" with the registry {shown(registered)}" if apart else "")


def use(tracking: str, registry: str) -> None:
    """Use these addresses for the rest of the process."""
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(registry)


def absent() -> bool:
    """Whether the store is a database that no run has made yet."""
    file = address.file_of(uri())
    return file is not None and not file.exists()


def client() -> mlflow.MlflowClient:
    """A client of the store in use."""
    settings.apply()
    for address_of in addresses():
        address.check_kind(address_of)
        if address_of.startswith(DATABASES):
            _prepare(address_of)
    address.check_registry(*addresses())
    return _Client()


class _Client(mlflow.MlflowClient):
    """MLflow's client, that repeats what was cut off and holds signals off database calls.

    - When a server's answer is cut off, MLflow repeats the request only in part. Here whatever may
      come twice is asked again.
    - Signals are held off during calls to a database. SQLAlchemy gives up its connection when
      KeyboardInterrupt or the like is raised in a statement, but the traceback keeps the statement
      alive, and with it SQLite's lock: the run could not be ended while its process lives.
    """

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name.startswith("_") or not callable(method):
            return method

        @functools.wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            if not is_served(registry() if REGISTERS.search(name) else uri()):
                with signals.held():
                    return method(*arguments, **options)
            tries = TRIES if name.startswith(REPEATABLE) else 1
            return insist(lambda: method(*arguments, **options), tries)

        return call


@functools.lru_cache(maxsize=4)
def _prepare(uri: str) -> None:
    """Make a new database's tables, one process at a time: MLflow's own two would collide."""
    if not is_served(uri):
        with locks.claim(address.canonical(uri), "tables"):
            file = address.file_of(uri)
            if file and "?" not in uri and not file.exists():
                create(file)
            with _no_stray_folder(uri):
                mlflow.MlflowClient(uri).search_experiments(max_results=1)


@contextlib.contextmanager
def _no_stray_folder(uri: str) -> Iterator[None]:
    """Remove the empty folder that MLflow makes where an address writes `%25` for a `%`."""
    written = Path(uri.removeprefix(address.SQLITE))
    missing = [folder for folder in written.parents if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it is not there, or not empty
                folder.rmdir()


def create(path: Path, artifacts: str | None = None) -> None:
    """Make a SQLite store. Its file appears only when it is complete.

    MLflow cannot open one whose making was cut short, nor finish it.

    Args:
        path: Of the database.
        artifacts: Root of the files, in place of MLflow's own choice.

    Raises:
        InputError: The folder cannot be written.
    """
    folder = path.with_name(f".{path.name}.new")
    shutil.rmtree(folder, ignore_errors=True)  # what a process left that was killed here
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot make the store {path}: {error.strerror or error}") from None
    new = folder / path.name
    quoted_folder = "'" in os.getcwd()  # MLflow writes it into a statement as it is
    with _no_stray_folder(address.of_file(new)):
        if artifacts or quoted_folder:
            # Here, since a client of a server need not wait the second that its import takes.
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            SqlAlchemyStore(address.of_file(new), artifacts or "mlflow-artifacts:/")
        else:
            mlflow.MlflowClient(address.of_file(new)).search_experiments(max_results=1)
    if quoted_folder and not artifacts:
        with contextlib.closing(sqlite3.connect(new)) as database, database:
            choice = os.path.abspath("mlruns/0")  # MLflow's own
            database.execute("UPDATE experiments SET artifact_location = ?", (choice,))
    if not path.exists():  # else another program was faster
        new.replace(path)
    shutil.rmtree(folder)


def away(error: BaseException) -> bool:
    """Whether the store did not answer or its database failed, as against refusing a request.

    What was asked may be asked again later, and what was not logged may be logged later. MLflow
    wraps some of these errors in others, which say that something does not exist.
    """
    return (
        cut(error)
        or sent_twice(error)
        or any(
            cause.error_code == "TEMPORARILY_UNAVAILABLE"
            or (not isinstance(cause, RestException) and bool(NO_ANSWER.search(str(cause))))
            for cause in failures.chain(error)
            if isinstance(cause, MlflowException)
        )
    )


def cut(error: BaseException) -> bool:
    """Whether a server's answer began and was cut off."""
    return any(CUT.search(str(cause)) for cause in failures.chain(error))


def sent_twice(error: BaseException) -> bool:
    """Whether a database refuses a row that it has: MLflow sent again what had been done."""
    mlflows = (cause for cause in failures.chain(error) if isinstance(cause, MlflowException))
    return any(TWICE.search(str(cause)) for cause in mlflows)


def barred(error: BaseException) -> bool:
    """Whether the store asks for another login, or does not let this one do what was asked."""
    refused = r"\b401\b|error code 403\b"
    return isinstance(error, MlflowException) and bool(re.search(refused, str(error)))


def explained(error: BaseException) -> str:
    """One plain line about a store's error."""
    broken = None if is_served(uri()) else failures.explained(error)
    if broken:
        return f"the store {where()} fails: {broken.removeprefix(DATABASE)}"
    first = first_line(error)
    if refused := [cause for cause in failures.chain(error) if isinstance(cause, sqlite3.Error)]:
        return f"the store {where()} fails: {refused[-1]}"
    if away(error):
        texts = re.findall(r"(?<=\] )[\w ]+|timed out|too many \d+ error responses", _texts(error))
        why = texts[0] if texts else "an answer was cut off" if cut(error) else ""
        return f"the store {where()} does not answer" + (f" ({why})" if why else "")
    if "error code 403" in first and "Permission denied" in first:
        return (
            f"the store {shown(uri())} does not let this login write there; whoever made the "
            "experiment or the model lets others in, or the admin"
        )
    if barred(error) and "error code 403" not in first:
        return (
            f"the store {shown(uri())} does not let you in; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    return f"the store {where()} refuses: {shown(first)}"


def _texts(error: BaseException) -> str:
    """First lines of an error and of those that it came of."""
    return "\n".join(first_line(cause) for cause in failures.chain(error))


def insist(act: Callable[[], T], tries: int = TRIES) -> T:
    """Make a repeatable request; repeat it if its answer was cut off or lost."""
    for _ in range(tries - 1):
        try:
            return act()
        except Exception as error:
            if not (cut(error) or sent_twice(error)):
                raise
    return act()


def ask(question: Callable[[], T], otherwise: T, *, anyway: bool = False) -> T:
    """The store's answer; `otherwise` where it does not answer, or did not a moment ago.

    Args:
        question: Asks it.
        otherwise: In place of the answer.
        anyway: Ask also if it did not answer a moment ago.
    """
    uri = mlflow.get_tracking_uri()
    if time.monotonic() < _silent_until.get(uri, 0.0) and not anyway:
        return otherwise
    try:
        return question()
    except MlflowException as error:
        if not away(error):
            raise
        _silent_until[uri] = time.monotonic() + PAUSE
        return otherwise


def experiments() -> list[str]:
    """Ids of all experiments."""
    return [e.experiment_id for e in client().search_experiments()]


def quoted(value: str) -> str:
    """A value to put between quotes in a search filter.

    Raises:
        InputError: It holds a quote or a backslash.
    """
    if "'" in value or "\\" in value:
        raise InputError(f"{value!r} holds a quote or backslash; no name or ID here does")
    return value
