"""The alarm is raised once for each row of steps that go too far."""

from __future__ import annotations

from lsa.watching.alarm import Alarm


def test_it_is_raised_once_for_each_row():
    alarm = Alarm(2)
    gains = {25: 0.1, 30: -0.1, 35: -0.2, 40: -0.1, 45: 0.1, 50: -0.1, 55: 0.1, 60: -1, 65: -1}
    raised = [step for step, gain in gains.items() if alarm.sees(step, {"gain": gain})]
    assert raised == alarm.steps == [35, 65]


def test_a_short_critical_factor_counts_and_other_rows_do_not():
    alarm = Alarm(2)
    assert not alarm.sees(30, {"gain": 0.1, "critical_factor": 1.8})
    assert not alarm.sees(31, {"gradient_norm": 3.0})
    assert alarm.sees(40, {"gain": 0.1, "critical_factor": 0.9})


def test_it_is_off_by_default_and_in_the_first_steps():
    assert not any(Alarm(0).sees(step, {"gain": -1.0}) for step in range(100))
    assert not any(Alarm(1).sees(step, {"gain": -1.0}) for step in range(21))
