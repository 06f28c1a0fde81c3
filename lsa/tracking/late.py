"""What a server did after its client had stopped waiting for the answer.

MLflow sends a request again when no answer comes. A busy server may carry out the first one later
than the second, and later than the client has looked for what is double. Nothing that reads counts
these doubles; here they are found and removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

from lsa.tracking import registered, runs, store
from lsa.tracking.run import TOKEN
from lsa.tracking.store import client

REMOVED = "removed"  # what became of it, in a word


@dataclass(frozen=True)
class Late:
    """Something that the store has twice."""

    what: str
    remove: Callable[[], object]


def doubles() -> Iterator[Late]:
    """Doubles in the store of steps that are finished."""
    yield from _versions()
    yield from _runs()
    yield from _models()


def remove() -> Iterator[tuple[str, str]]:
    """Remove it, where the store answers.

    Yields:
        What it was, and `removed` or why it stays.
    """
    for double in store.ask(lambda: list(doubles()), []):
        try:
            double.remove()
            yield double.what, f"{REMOVED}; it was there twice, since the server had answered late"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # else another has removed it
                yield double.what, f"stays: {store.explained(error)}"


def _versions() -> Iterator[Late]:
    """Versions of a model that is registered under the same name already.

    One with an alias was chosen by somebody.
    """
    versions = list(registered.every())
    kept = {(version.name, version.version) for version in registered.firsts(versions)}
    for version in versions:
        named = (version.name, version.version)
        if named not in kept and not client().get_model_version(*named).aliases:
            act = partial(client().delete_model_version, *named)
            yield Late(f"checkpoint models:/{version.name}/{version.version}", act)


def _runs() -> Iterator[Late]:
    """Open runs of an entry of which another run is finished."""
    for run in runs.running():
        if not (token := run.tags.get(TOKEN)):
            continue
        criteria = f"tags.`{TOKEN}` = '{store.quoted(token)}' and attributes.status = 'FINISHED'"
        if client().search_runs(store.experiments(), criteria, max_results=1):
            yield Late(f"run {run.run_id}", partial(client().delete_run, run.run_id))


def _models() -> Iterator[Late]:
    """Models of finished trainings, without the files."""
    for model in runs.logged_models("model_type = 'lsa.checkpoint'"):
        if model.status == LoggedModelStatus.READY:
            continue
        if client().get_run(model.source_run_id).info.status == "FINISHED":
            act = partial(client().delete_logged_model, model.model_id)
            yield Late(f"model {model.model_id}", act)
