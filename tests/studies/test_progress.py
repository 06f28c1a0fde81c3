"""How far work is, where it is reported in parts and where nobody watches."""

from __future__ import annotations

import io

import pytest

from lsa.studies import progress


def test_a_position_never_goes_back_and_the_end_is_where_it_says():
    whole = progress.Combined()
    search = [whole.so_far(i, 500) for i in range(1, 18)]  # ends before its bound
    density = [whole.so_far(i, 5) for i in range(1, 6)]
    assert search[-1] == (17, 500) and density == [(17 + i, 22) for i in range(1, 6)]
    again = [whole.so_far(i, 5) for i in range(1, 6)]
    assert again[-1] == (27, 27)
    done = [position for position, _ in (*search, *density, *again)]
    assert done == sorted(done)


def test_a_total_that_becomes_known_better_is_no_new_part():
    whole = progress.Combined()
    assert [whole.so_far(2, 8), whole.so_far(4, 6), whole.so_far(6, 6)] == [(2, 8), (4, 6), (6, 6)]


def test_where_nobody_watches_a_line_is_said_a_minute(monkeypatch):
    now = iter([0.0, 0.0, 59.0, 59.0, 61.0, 61.0, 62.0, 62.0, 130.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    said = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", said)
    with progress.bar("lanczos-sgd") as report:
        for done in (5, 10, 15, 3):
            report(done, 20, "λ")
    assert said.getvalue().splitlines() == [
        "lanczos-sgd: λ 10/20, 1 min",
        "lanczos-sgd: λ 18/35, 2 min",
    ]


def test_a_bar_is_full_at_its_end(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    shown = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", shown)
    with progress.bar("lanczos-sgd") as report:
        report(17, 500, "λ")
    assert "17/17" in shown.getvalue()


@pytest.fixture(autouse=True)
def drawn():
    """Other tests may have redirected it."""
    progress.redirect(None)
