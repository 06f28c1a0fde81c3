"""Delivery of what the spool keeps, exactly once."""

from __future__ import annotations

from collections.abc import Iterator

from lsa.runtime import locks
from lsa.runtime.errors import InputError
from lsa.tracking import recording, registry, runs, spool, store


def deliver(entry: spool.Entry) -> str:
    """Have a whole entry in the store as one finished run, and remove it from the spool.

    A run that was begun for it, by its step or by a delivery that was cut short, is taken up again.

    Returns:
        The run.

    Raises:
        NotLogged: The store does not take it; the entry stays.
    """
    try:
        return _deliver(entry)
    except recording.REFUSALS as error:
        raise spool.NotLogged(
            f"{entry.content.name} is measured, not logged: {store.explained(error)}; it is kept "
            f"in {spool.folder()}; deliver it with: lsa sync"
        ) from None


def _deliver(entry: spool.Entry) -> str:
    done = runs.finished(entry.content.tags["lsa.key"])
    if done is None:
        opened = recording.Run(entry)
        registry.deliver(opened)
        opened.end("FINISHED")
    entry.drop()
    return done.run_id if done else entry.content.run_id


def sync() -> Iterator[tuple[str, str]]:
    """Deliver every entry that is for the store in use.

    Yields:
        Its name, and what became of it: the run that it is now, or why it stays.
    """
    here = store.shown(store.uri())
    for path in spool.entries():
        name = path.name
        try:
            entry = spool.read(path)
            name, key, to = entry.content.name, entry.content.tags["lsa.key"], entry.content.store
            if to != here:
                yield name, f"stays: it is for the store {to}"
                continue
            with locks.claim(store.uri(), key):
                if path in spool.entries():  # else its own step has delivered it just now
                    yield name, f"run {_deliver(entry)}"
        except InputError as error:
            yield name, f"stays: {error}"
        except recording.REFUSALS as error:
            yield name, f"stays: {store.explained(error)}"
