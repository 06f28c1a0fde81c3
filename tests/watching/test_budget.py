"""The share of time that a watch takes, by a clock that the tests turn."""

from __future__ import annotations

import math

import pytest

from lsa.watching import budget
from lsa.watching.budget import FIRST, Budget

STEP = 1.0


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(budget, "time", made)
    return made


def train(
    clock: Clock, share: float, steps: int, *, one: float, pieces: int, first: float, every: int
) -> tuple[list[int], list[float], list[float]]:
    """Steps that were measured, and overhead and time after each step.

    Args:
        clock: Turned by a second for each step.
        share: The budget.
        steps: Of the training.
        one: Seconds of one piece of a measurement.
        pieces: That it has.
        first: How much longer the first measurement takes.
        every: Steps between those at which it is due.
    """
    kept = Budget(share)
    with kept.timed("norms"):
        clock.now += 1e-3
    measured, overheads, times = [], [], []
    for step in range(1, steps + 1):
        clock.now += STEP
        kept.has_made(step)
        if step % every == 0 and kept.allows("probes"):
            if kept.unknown("probes"):
                with kept.timed("trial of probes"):
                    clock.now += one
                kept.expect("probes", pieces)
            else:
                with kept.timed("probes"):
                    clock.now += one * pieces * (1 if measured else first)
                measured.append(step)
        overheads.append(kept.overhead)
        times.append(kept.training)
    return measured, overheads, times


@pytest.mark.parametrize("share", [0.005, 0.02, 0.2])
@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize("pieces", [5, 200])
@pytest.mark.parametrize("first", [1.0, FIRST])
def test_it_holds_from_the_first_step_on(
    clock: Clock, share: float, every: int, pieces: int, first: float
):
    one = 0.4
    measured, overheads, times = train(
        clock, share, 6000, one=one, pieces=pieces, first=first, every=every
    )
    assert all(o <= share + 2e-3 / t for o, t in zip(overheads, times, strict=True))
    expected = FIRST * pieces * one / share
    if expected < 5000:  # it is measured as soon as it fits, and then as often as it does
        assert expected <= measured[0] <= 1.3 * expected + 2 * every
        most = min(6000 / every, share * 6000 / (pieces * one))
        assert 0.6 * most - 3 <= len(measured) <= most + 1
    else:
        assert len(measured) <= 1


def test_a_training_too_short_for_one_is_left_alone(clock: Clock):
    measured, overheads, _ = train(clock, 0.02, 160, one=0.4, pieces=17, first=2.0, every=100)
    assert measured == []
    assert 0 < max(overheads) <= 0.02


def test_a_first_that_takes_longer_than_expected_is_made_up_for(clock: Clock):
    measured, overheads, _ = train(
        clock, 0.02, 20_000, one=0.4, pieces=10, first=5 * FIRST, every=10
    )
    assert max(overheads) < 0.11
    assert measured[1] - measured[0] > 1000
    assert overheads[-1] <= 0.02


def test_none_is_no_limit():
    free = Budget(None)
    assert free.allows("probes") and not free.unknown("probes")


def test_all_of_a_block_is_the_watchs_and_its_parts_cost_what_they_take(clock: Clock):
    kept = Budget(0.02)
    with kept.counted():
        clock.now += 1.0
        with kept.timed("norms"):
            clock.now += 2.0
            with kept.counted():
                clock.now += 4.0
    kept.add(0.5)
    assert kept.spent == 7.5
    clock.now += 100 * STEP
    kept.has_made(100)
    assert kept.training == 99.5
    assert kept.interval("norms", 1, 0.5) == math.ceil(6.0 / (0.5 * 0.02 * 0.995))
