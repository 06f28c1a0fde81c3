"""Workers are forked from a process that has imported, and know what this one is told."""

from __future__ import annotations

import os
import sys
import tempfile
import types

import numpy as np
import pytest

from lsa.studies.engines import workers
from lsa.studies.engines.local import Processes


def loaded(name: str) -> bool:
    """Asked of a worker that has run nothing yet."""
    return name in sys.modules


def chance() -> float:
    """Of NumPy's global generator; its method would take this process's state along."""
    return np.random.random()


@pytest.mark.parametrize("folder", ["/tmp/" + 80 * "x", None])
def test_where_a_socket_has_no_place_they_start_afresh(monkeypatch, folder):
    def temporary() -> str:
        if folder is None:
            raise FileNotFoundError
        return folder

    monkeypatch.setattr(tempfile, "gettempdir", temporary)
    assert workers.context().get_start_method() == "spawn"
    workers.prepare()  # nothing to begin


def test_macos_starts_them_afresh(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert workers.context().get_start_method() == "spawn"


@pytest.mark.skipif(not workers.forks(), reason="nothing is forked here")
def test_a_worker_has_what_it_needs_and_nothing_of_this_process(monkeypatch):
    monkeypatch.setitem(sys.modules, "of_this_process", types.ModuleType("of_this_process"))
    context = workers.context()
    assert context.get_start_method() == "forkserver"
    with context.Pool(1) as pool:
        assert pool.apply(loaded, ("lsa.studies.study",))
        assert not pool.apply(loaded, ("of_this_process",))


def test_a_worker_has_the_environment_of_now_and_chance_of_its_own(workplace, monkeypatch):
    drawn = []
    for text in ("first", "second"):
        monkeypatch.setenv("LSA_TOLD", text)
        engine = Processes(1, None)
        try:
            assert engine.submit(os.getenv, "LSA_TOLD").result(120) == text
            drawn.append(engine.submit(chance).result(120))
        finally:
            engine.shutdown()
    assert drawn[0] != drawn[1]
