"""A worker's end, also when the exception that should end it was replaced."""

from __future__ import annotations

import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest
from processes import forked

from lsa.runtime import signals
from lsa.studies.engines import local

REPLACED = """
import os, signal
from lsa.runtime import signals
from lsa.studies.engines import local

def work():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except signals.Killed:
        raise RuntimeError("as in an import")

local._work(work)
print("went on")
"""


def test_a_worker_ends_by_a_signal_whose_exception_was_replaced():
    done = forked(code=REPLACED)
    assert done.returncode == 143 and done.stdout == ""


def test_a_study_in_one_process_stops_by_it_too():
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except signals.Killed:
            raise RuntimeError("as in an import") from None

    with signals.caught(), pytest.raises(RuntimeError):
        local.Inline().submit(work)  # an error of the step's own would be in the future


def test_an_error_of_a_step_is_in_its_future():
    def work() -> None:
        raise ValueError("of its own")

    assert isinstance(local.Inline().submit(work).exception(), ValueError)


def test_a_call_to_a_pool_that_has_broken_is_lost_with_those_in_it(workplace):
    """A study that submits before it has heard of the death takes all of them up again."""
    engine = local.Processes(1, None)
    try:
        with pytest.raises(BrokenProcessPool):
            engine.submit(os._exit, 1).result(120)
        assert isinstance(engine.submit(os.getpid).exception(120), BrokenProcessPool)
        engine.restart()
        assert engine.submit(os.getpid).result(120) != os.getpid()
    finally:
        engine.shutdown()
