"""What a study shows: lines in a log, a table on a terminal."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from rich.console import Console

from lsa.studies import view


@dataclass(eq=False)
class Step:
    """What a view reads of a handle."""

    label: str
    kind: str = "lanczos"
    state: str = "waiting"
    run_id: str = "r1"
    error: str = ""
    call: SimpleNamespace = field(init=False)

    def __post_init__(self):
        self.call = SimpleNamespace(label=self.label, step=self.kind)

    @property
    def finished(self) -> bool:
        return self.state not in ("waiting", "running")


def test_a_log_has_one_line_per_step():
    said: list[str] = []
    lines = view.Lines(said.append, total=2)
    lines.finished(Step("lanczos sgd", state="done"))
    lines.finished(Step("lanczos adamw", state="failed", error="no memory"))
    assert said == ["[1/2] lanczos sgd: done (run r1)", "[2/2] lanczos adamw: failed (no memory)"]


def test_the_time_left_follows_what_steps_take(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: clock[0])
    screen = view.Screen({"lanczos": 10.0, "train": 100.0}, total=4, workers=2)
    handles = [Step("a"), Step("b"), Step("c"), Step("t", "train")]
    screen.refresh(handles)
    assert screen.seconds_left() == pytest.approx((3 * 10 + 100) / 2)
    handles[0].state = "running"
    screen.refresh(handles)
    clock[0] = 4.0
    assert screen.seconds_left() == pytest.approx((6 + 2 * 10 + 100) / 2)
    handles[0].state = "done"
    screen.finished(handles[0])  # it took 4 s, not 10
    assert screen.seconds_left() == pytest.approx((2 * 4 + 100) / 2)


def test_a_terminal_sees_what_runs_and_how_far_it_is():
    screen = view.Screen({}, total=3, workers=1)
    handles = [Step("lanczos sgd", state="done"), Step("lanczos adamw", state="running")]
    screen.refresh(handles)
    screen.progress("lanczos adamw", 7, 40, "residual 0.1")
    out = io.StringIO()
    Console(file=out, width=100).print(screen._table())
    assert "1/3 steps" in out.getvalue() and "residual 0.1 7/40" in out.getvalue()
    assert "lanczos sgd" not in out.getvalue()


def test_on_a_narrow_terminal_names_and_times_stay_whole():
    screen = view.Screen({"auto_neb": 500.0}, total=3, workers=1)
    screen.refresh([Step("auto_neb sgd_momentum – adamw seed 0", "auto_neb", state="running")])
    long = "cycle 1: max energy 0.01741, gradient across 0.44"
    screen.progress("auto_neb sgd_momentum – adamw seed 0", 300, 340, long)
    out = io.StringIO()
    Console(file=out, width=70).print(screen._table())
    head, row = out.getvalue().rstrip().split("\n")
    assert head.rstrip().endswith("about 8.3 min left")
    assert row.startswith("auto_neb sgd_momentum – adamw seed 0  cycle 1") and "…" in row
    assert row.rstrip().endswith("0 s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (89, "89 s"),
        (92, "1.5 min"),
        (120, "2 min"),
        (5000, "83 min"),
        (9000, "2.5 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert view.duration(seconds) == text
