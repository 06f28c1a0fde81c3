"""How a step's run ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import sqlalchemy
from sqlalchemy.orm import loading

from lsa.runtime import signals
from lsa.tracking import recording, runs

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def once() -> Callable[[], None]:
    """What sends SIGTERM to this process the first time that it is called."""
    signs = [signal.SIGTERM]

    def strike() -> None:
        if signs:
            os.kill(os.getpid(), signs.pop())
            time.sleep(1)

    return strike


@pytest.fixture
def within_an_insertion():
    strike = once()

    def executed(cursor, text, parameters, _):
        if not text.startswith("INSERT INTO metrics"):
            return False
        cursor.executemany(text, parameters)
        strike()
        return True

    sqlalchemy.event.listen(sqlalchemy.Engine, "do_executemany", executed)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "do_executemany", executed)


@pytest.fixture
def within_a_result(monkeypatch):
    """Its first row is not read yet; metrics were inserted in the same transaction."""
    strike, processor = once(), loading._instance_processor

    def made(query, mapper, *arguments, **options):
        if mapper.class_.__name__ == "SqlLatestMetric":
            strike()
        return processor(query, mapper, *arguments, **options)

    monkeypatch.setattr(loading, "_instance_processor", made)


@pytest.mark.parametrize("struck", ["within_an_insertion", "within_a_result"])
def test_a_signal_within_a_statement_leaves_no_lock_on_the_database(workplace, request, struck):
    with (
        signals.caught(),
        pytest.raises(signals.Killed) as stop,
        recording.run("x", experiment="e", tags={}, device="cpu") as run,
    ):
        run.metrics({"loss": 1.0, "accuracy": 0.5})
        run.send()
        request.getfixturevalue(struck)
        run.metrics({"loss": 2.0, "accuracy": 0.6}, step=1)
        run.send()
    assert stop.value.run_ended
    ended = runs.read(run.id)
    assert ended.status == "KILLED"
    assert ended.metrics == {"loss": 2.0, "accuracy": 0.6}
