"""Where probes are: the files of `lsa/probes`, and entry points of other packages."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from lsa.probe.declaration import PROBES, Probe
from lsa.runtime.errors import InputError


def modules() -> dict[str, str]:
    """Probe name → module: the files of `lsa/probes`, then entry points of group `lsa.probes`."""
    folder = Path(__file__).parent.parent / "probes"
    known = {
        p.stem: f"lsa.probes.{p.stem}" for p in sorted(folder.glob("*.py")) if p.stem[0] != "_"
    }
    for entry in _entries(entry_points):
        if known.get(entry.name, entry.module) != entry.module:
            raise InputError(
                f"probe {entry.name!r} is declared in both {known[entry.name]} and "
                f"{entry.module}; uninstall one or rename its entry point"
            )
        known[entry.name] = entry.module
    return known


@functools.lru_cache(maxsize=1)
def _entries(listed: Callable[..., Iterable[EntryPoint]]) -> tuple[EntryPoint, ...]:
    """Entry points of the group `lsa.probes`, read once from all installed packages."""
    return tuple(listed(group="lsa.probes"))


def find(name: str) -> Probe:
    """The probe of that name, its module imported on demand.

    Raises:
        InputError: There is no such probe.
    """
    if not isinstance(name, str):
        raise InputError(f"probe={name!r} is a {type(name).__name__}; give a probe's name")
    if name in PROBES:  # to list all, the metadata of every installed package is read
        return PROBES[name]
    known = modules()
    if name not in known:
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown probe {name!r}; {hint}known: {', '.join(known)}")
    importlib.import_module(known[name])
    if name not in PROBES:
        raise InputError(f"module {known[name]} declares no probe named {name!r}; mend the package")
    return PROBES[name]
