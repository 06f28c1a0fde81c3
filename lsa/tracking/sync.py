"""Delivery of the spool's entries to the store, each exactly once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from lsa.runtime import locks
from lsa.runtime.errors import InputError
from lsa.tracking import address, late, recording, registry, runs, spool, store, stream

log = logging.getLogger(__name__)


def deliver(entry: spool.Entry) -> str | None:
    """Log a complete entry as one finished run, and remove it from the spool.

    A run that was begun for it, by its step or by a delivery that was cut short, is taken up again.

    Returns:
        The run; None of an entry that is damaged, which is set aside.

    Raises:
        NotLogged: The store does not take it; the entry stays.
    """
    try:
        return _deliver(entry)
    except spool.Damaged as error:
        log.warning("%s; it is kept in %s", error, spool.set_aside(entry.path))
        return None
    except recording.REFUSALS as error:
        raise spool.NotLogged(
            f"{entry.content.name} is measured, not logged: {store.explained(error)}; it is kept "
            f"in {spool.folder()}; deliver it with: lsa sync"
        ) from None


def _deliver(entry: spool.Entry) -> str:
    registry.check(entry)
    finished = runs.every_finished(entry.content.tags["lsa.key"])
    done = next((run for run in finished if recording.stands_for(run, entry)), None)
    if done:
        recording.give_way(entry.content, done.run_id)
    else:
        opened = recording.Run(entry)
        store.insist(lambda: registry.deliver(opened))
        opened.end("FINISHED")
    entry.drop()
    return done.run_id if done else entry.content.run_id


def sync() -> Iterator[tuple[str, str]]:
    """Deliver every entry and stream for the store in use; set entries aside that are damaged.

    Then remove what a server has made twice.

    Yields:
        Its name, and what became of it: the run that it is now, why it stays, or `removed`.
    """
    yield from stream.deliver()
    for path in spool.entries():
        name = path.name
        try:
            entry = spool.read(path)
            name, key = entry.content.name, entry.content.tags["lsa.key"]
            if elsewhere := _elsewhere(entry):
                yield name, f"stays: it is for the {elsewhere}"
                continue
            with locks.claim(store.identity(), key):
                if path.exists():  # else its own step has delivered it just now
                    yield name, f"run {_deliver(entry)}"
        except spool.Damaged as error:
            if path.exists():  # else another process has delivered it just now
                yield name, f"stays: it is kept in {spool.set_aside(path)}, since {error}"
        except InputError as error:
            yield name, f"stays: {error}"
        except recording.REFUSALS as error:
            yield name, f"stays: {store.explained(error)}"
    if not store.absent():
        yield from late.remove()


def _elsewhere(entry: spool.Entry) -> str:
    """The store or registry that an entry is for, where another one is in use; else empty."""
    to, registry = entry.content.store, entry.content.registry
    if address.canonical(to) != store.identity():
        return f"store {to}"
    registers = registry and entry.checkpoints()
    if registers and address.canonical(registry) != address.canonical(store.registry()):
        return f"registry {registry}; set MLFLOW_REGISTRY_URI"
    return ""
