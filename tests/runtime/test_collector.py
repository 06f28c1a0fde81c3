"""How often Python searches for garbage while a command starts, and after."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest

from lsa.cli import app
from lsa.runtime import collector
from lsa.studies import train
from lsa.training import train as training


@pytest.fixture(autouse=True)
def usual():
    """The thresholds of this process, which a test must leave as they are."""
    before = gc.get_threshold()
    yield before
    after = gc.get_threshold()
    gc.set_threshold(*before)
    assert after == before


def test_it_is_put_off_within_and_as_before_after_it(usual):
    with collector.put_off():
        assert gc.get_threshold() == collector.SELDOM
        assert gc.isenabled()
    assert gc.get_threshold() == usual


def test_what_computes_has_it_as_before_and_keeps_it(usual):
    with collector.put_off():
        collector.resume()
        assert gc.get_threshold() == usual
        gc.set_threshold(800, 9, 8)  # by the user's code, say
    assert gc.get_threshold() == (800, 9, 8)
    gc.set_threshold(*usual)


def test_nothing_is_resumed_that_was_not_put_off(usual):
    collector.resume()
    assert gc.get_threshold() == usual


def test_it_is_resumed_after_an_error():
    with pytest.raises(ValueError, match="bad"), collector.put_off():
        raise ValueError("bad")


def test_a_step_computes_with_it_as_before(workplace, monkeypatch, usual):
    seen = []

    def watched(*args, **kwargs):
        seen.append(gc.get_threshold())
        return training.train(*args, **kwargs)

    monkeypatch.setattr(train, "training", SimpleNamespace(**{**vars(training), "train": watched}))
    assert app.run(["train", "--project", "tiny", "--optimizer", "sgd"]) == 0
    assert seen == [usual]
