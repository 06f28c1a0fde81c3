"""Signals to this very process."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
import weakref

import pytest

from lsa.runtime import signals

PATIENCE = 10.0  # seconds, many times `signals.AGAIN`


class Anything:
    pass


def kill() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def wait() -> None:
    """Let a signal come that is on its way."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_signal_raises_and_more_are_ignored_while_it_is_dealt_with():
    former = signal.getsignal(signal.SIGTERM)
    ended = False
    with signals.caught():
        try:
            kill()
            wait()
        except signals.Killed as stop:
            kill()
            os.kill(os.getpid(), signal.SIGINT)
            ended = True
            assert stop.exit_code == 143 and str(stop) == "SIGTERM"
    assert ended
    assert signal.getsignal(signal.SIGTERM) is former
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exception_that_a_callback_drops_is_raised_again(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's would keep it alive
    called = []

    def callback(_: weakref.ref) -> None:
        called.append(1)
        kill()

    with signals.caught():
        thing = Anything()
        reference = weakref.ref(thing, callback)
        del thing
        assert called and reference() is None  # and nothing was raised
        with pytest.raises(signals.Killed):
            wait()


def test_an_exception_that_a_library_swallows_is_raised_again():
    with signals.caught():
        for act in (kill, wait):
            with contextlib.suppress(BaseException):
                act()
        with pytest.raises(signals.Killed):
            wait()


def test_nothing_is_raised_when_the_block_is_over():
    with signals.caught(), pytest.raises(signals.Killed):
        kill()
    gc.collect()
    time.sleep(3 * signals.AGAIN)  # a second SIGTERM would end this process


def test_a_signal_is_found_behind_what_replaced_it():
    """As in a class body of Python 3.11, whose `__set_name__` errors become a RuntimeError."""
    with signals.caught():
        try:
            try:
                kill()
            except signals.Killed:
                raise RuntimeError("replaced") from None
        except RuntimeError as error:
            stop = signals.behind(error)
    assert stop is not None and stop.exit_code == 143
    assert signals.behind(ValueError("another")) is None


def test_clean_up_after_an_error_is_not_interrupted():
    done = False
    with pytest.raises(signals.Killed) as stop, signals.caught():
        try:
            raise ValueError("an error, while another process asks this one to stop")
        except ValueError:
            with signals.held():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)  # here the handler runs
                done = True
            raise
    assert done and stop.value.exit_code == 128 + signal.SIGTERM
