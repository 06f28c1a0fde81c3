"""The command that gives the tracking store what it has missed."""

from __future__ import annotations


def sync() -> None:
    """Log what has been measured while the tracking store did not answer."""
    from lsa import spool
    from lsa import sync as delivery

    found = list(map(_told, delivery.sync()))
    if not found:
        print(f"nothing waits in {spool.folder()}")
    stay = sum(not delivered for delivered in found)
    if stay:
        raise spool.NotLogged(f"{stay} of {len(found)} entries stay in {spool.folder()}")


def _told(one: tuple[str, str]) -> bool:
    """Print what became of an entry; whether it is delivered."""
    name, end = one
    print(f"{name}: {end}", flush=True)
    return end.startswith("run ")
