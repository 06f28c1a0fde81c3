"""Each process begins with tests that take long, and none is left out."""

from __future__ import annotations

import pytest
from order import dealt

SLOW = {"b": 3, "e": 40, "g": 1}  # module → its tests
FAST = {"a": 20, "c": 9, "d": 31, "f": 5, "h": 11}
TESTS = [(name, i) for name, n in sorted((SLOW | FAST).items()) for i in range(n)]


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_every_part_begins_with_slow_modules_that_stay_whole(parts):
    found = dealt(TESTS, parts, lambda t: t[0], lambda t: t in {("b", 2), ("e", 0), ("g", 0)})
    assert sorted(found) == sorted(TESTS)
    for name, n in SLOW.items():
        first = found.index((name, 0))
        assert found[first : first + n] == [(name, i) for i in range(n)]
    fast = [test for test in found if test[0] in FAST]
    assert fast == [test for test in TESTS if test[0] in FAST]
    if parts <= len(SLOW):
        assert all(found[i][0] in SLOW for i in range(0, len(found), len(found) // parts))
