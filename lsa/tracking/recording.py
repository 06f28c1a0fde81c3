"""From the beginning of a run to its end, whatever that is: finished, failed, killed, or kept."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from lsa.runtime import documents, provenance, signals
from lsa.runtime.errors import Diverged, InputError, without_passwords
from lsa.tracking import address, attached, runs, spool, store
from lsa.tracking.address import is_served, shown
from lsa.tracking.run import TOKEN, Run, existing
from lsa.tracking.store import client, uri

log = logging.getLogger(__name__)
_PARENT: ContextVar[str | None] = ContextVar("parent", default=None)
REFUSALS = (MlflowException, OSError)  # what keeps a store from taking something


@contextlib.contextmanager
def run(
    name: str,
    *,
    experiment: str,
    tags: Mapping[str, Any],
    device: str,
    again: str | None = None,
    deliver: Callable[[Run], None] = Run.send,
) -> Iterator[Run]:
    """Open a run for the enclosed block: the one that `mlflow run` made, or a new one.

    The numbers and files of a step (a run with the tag `lsa.key`) are kept in the spool before they
    are sent. So the step may begin, measure and end while the store does not answer.

    The run ends as FINISHED, FAILED or KILLED. FAILED follows an error: its message is in the tag
    `lsa.error`, and its traceback is an artifact unless the error is one of input. KILLED follows a
    signal. The tags are set when the run is created, so that `runs.end_stale` finds it however
    early its process dies.

    Args:
        name: Of the run.
        experiment: The project's.
        tags: Set on it.
        device: Where it computes.
        again: A run to take up again instead of a new one.
        deliver: Sends all that the run has, at its end.

    Raises:
        InputError: The run to attach to is not there.
        NotLogged: The step is measured, but the store did not take it.
    """
    given = attached.use() or again
    if given:
        _check_there(given)
    client()  # the store is there
    git_tags, diff = provenance.git()
    versions = {f"lsa.version.{k}": v for k, v in provenance.versions().items()}
    described = {**versions, **git_tags, **provenance.machine(device), **tags}
    tags_of_all = {k: str(v) for k, v in described.items()}
    content = spool.Content(
        name, experiment, shown(uri()), registry=shown(store.registry()), tags=tags_of_all
    )
    _address_entry(content, given)
    key = content.tags.get("lsa.key")
    # A database that takes nothing still tells what it has.
    told = not is_served(uri())
    earlier = store.ask(lambda: _earlier(key), set(), anyway=told) if key else set()
    opened = Run(spool.begin(key, content))
    token = _PARENT.set(opened.id or _PARENT.get())
    try:
        opened.attempt() if key else store.insist(opened.send)
        _PARENT.set(opened.id or None)
        if diff:
            opened.text(diff, "provenance/uncommitted.diff")
        yield opened
        if key:
            opened.entry.keep()
        store.insist(lambda: _finish(opened, key, earlier, deliver))
        opened.entry.drop()
    except BaseException as error:
        if opened.entry.kept and isinstance(error, REFUSALS):
            raise spool.NotLogged(
                f"{name} is measured, not logged: {store.explained(error)}; it is kept in "
                f"{spool.folder()}; deliver it with: lsa sync"
            ) from None
        with signals.held():
            _fail(opened, error)
        raise
    finally:
        _PARENT.reset(token)


def _check_there(run_id: str) -> None:
    """Refuse a run that is in another store.

    Raises:
        InputError: It is not there.
    """
    file = address.file_of(uri())
    missing = file is not None and not file.exists()
    try:
        if not missing:
            store.ask(lambda: client().get_run(run_id), None)
    except MlflowException as error:
        missing = error.error_code == "RESOURCE_DOES_NOT_EXIST"
    if missing:
        raise InputError(
            f"run {run_id}, which mlflow run has made, is not in {shown(uri())}; a relative "
            "address names another file in this folder: set MLFLOW_TRACKING_URI to a full one"
        )


def _address_entry(content: spool.Content, given: str | None) -> None:
    """Give an entry its run, or the experiment, parent and tags of the run to be made."""
    if given:
        content.run_id = given
        content.tags["mlflow.runName"] = content.name
        return
    content.tags = resolve_tags({**content.tags, TOKEN: content.token})
    above = mlflow.active_run()  # of the caller's own
    around = above.info.run_id if above else attached.enclosing()
    study = _PARENT.get()
    if study and content.tags.get("lsa.step") == "train":
        content.tags["lsa.study"] = study  # beside it: folded in one run, none could be compared
    elif parent := study or around:
        content.tags["mlflow.parentRunId"] = parent
    content.experiment_id = above.info.experiment_id if above else attached.experiment_id()


# --- the same step, measured by others meanwhile --------------------------------------------------


def _earlier(key: str) -> set[str]:
    """The finished runs of a step; those that killed processes left open are ended."""
    runs.end_stale("lsa.key", key)
    return _finished(key)


def _finished(key: str) -> set[str]:
    """IDs of the finished runs of a step."""
    return {done.run_id for done in runs.every_finished(key)}


def _others(opened: Run, key: str, earlier: set[str]) -> set[str]:
    """IDs of the runs of a step that clients elsewhere have finished since this one began."""
    later = [
        other for other in runs.every_finished(key) if other.run_id not in earlier | {opened.id}
    ]
    return {other.run_id for other in later if stands_for(other, opened.entry)}


def stands_for(done: runs.Done, entry: spool.Entry) -> bool:
    """Whether a finished run with the key of an entry's step holds what the entry does.

    Whoever may write into a store may give a run any tag, the key of our step too. The same step
    measured elsewhere has files of the same names, and JSON of the same keys.
    """
    if done.tags.get("lsa.step") == "train" and not done.tags.get("lsa.checkpoint"):
        return False
    own = [name for name in entry.files() if "/" not in name]
    if not set(own) <= set(runs.files(done.run_id)):
        return False
    try:
        return all(
            _keys(runs.artifact(done.run_id, name, done.artifacts))
            == _keys(documents.read_json(entry.file(name)))
            for name in own
            if name.endswith(".json")
        )
    except runs.Broken:
        return False


def _keys(content: Any) -> dict[str, Any] | None:
    """The keys of a JSON value, all the way down; None of one that has none."""
    return {k: _keys(v) for k, v in content.items()} if isinstance(content, dict) else None


def _finish(
    opened: Run, key: str | None, earlier: set[str], deliver: Callable[[Run], None]
) -> None:
    """Send all that a run has and end it, unless a client elsewhere has finished the same step.

    Locks keep two processes of a machine from that; nothing does it between machines. The run that
    has finished first is kept. Of two that finish at one moment the one with the smaller ID is:
    each of the clients that sees both decides alike.

    Args:
        opened: The run.
        key: Of its step, if it is one.
        earlier: IDs of the step's runs that had finished when this one began.
        deliver: Sends all.
    """
    others = sorted(_others(opened, key, earlier)) if key else []
    if others:
        give_way(opened.entry.content, others[0])
        return
    deliver(opened)
    opened.end("FINISHED")
    others = _others(opened, key, earlier) if key else set()
    kept, *doubles = sorted({opened.id, *others})
    for double in doubles:
        _end_double(double, kept)
    opened.entry.content.run_id = kept


def give_way(content: spool.Content, kept: str) -> None:
    """Let the run of another client stand for an entry, and end the entry's own."""
    own = existing(content, True)
    if own and own.info.run_id != kept:
        _end_double(own.info.run_id, kept)
    content.run_id = kept


def _end_double(run_id: str, kept: str) -> None:
    log.warning("the same step was measured twice; run %s is kept, %s does not count", kept, run_id)
    runs.remove_models(run_id)
    runs.give_up(run_id, f"the same step was measured twice; run {kept} is kept")


def _fail(opened: Run, error: BaseException) -> None:
    """End a run that was not measured to its end."""
    stop = signals.behind(error)
    killed = stop or isinstance(error, KeyboardInterrupt)
    gone = store.away(error)
    if not opened.entry.kept:  # else it is whole, and may yet be delivered
        if not killed:
            _note(opened, error)
        if not gone:
            with contextlib.suppress(*REFUSALS):  # the error that came first is the one to tell
                opened.attempt()
        opened.entry.leave()
    if opened.id and not gone:
        with contextlib.suppress(*REFUSALS):
            store.ask(lambda: opened.end("KILLED" if killed else "FAILED"), None)
        if stop:
            stop.run_ended = opened.ended


def _note(opened: Run, error: BaseException) -> None:
    with contextlib.suppress(OSError):  # a full disk does not take this either
        opened.tags({"lsa.error": without_passwords(str(error))[:5000]})
        if not isinstance(error, (InputError, Diverged)):
            opened.text(without_passwords(traceback.format_exc()), "traceback.txt")


def adopt(parent: str) -> None:
    """From here on, runs of this process are children of a run that another process holds."""
    _PARENT.set(parent)


def end_attached(status: str, message: str) -> bool:
    """End the run that `mlflow run` made for this process when no step has begun in it.

    Returns:
        Whether there is one and the store has taken it.
    """
    run_id = attached.use()
    if not run_id:
        return False
    try:
        client().set_tag(run_id, "lsa.error", message[:5000])
        client().set_terminated(run_id, status)
    except (MlflowException, InputError):
        return False
    return True
