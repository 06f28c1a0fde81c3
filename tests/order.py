"""The order in which several processes take the tests: what takes long is begun first.

pytest-xdist gives each process an equal part of the list, and who has finished his own takes from
the end of another's. A long test that is begun last would keep all the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

Test = TypeVar("Test")


def dealt(
    tests: Sequence[Test],
    parts: int,
    module: Callable[[Test], object],
    slow: Callable[[Test], bool],
) -> list[Test]:
    """The tests, reordered: each of so many equal parts begins with modules that are slow.

    A module with a slow test stays whole, so that its fixtures are made once.

    Args:
        tests: Module by module.
        parts: Processes.
        module: Of a test.
        slow: Whether a test takes long.
    """
    modules = [list(group) for _, group in groupby(tests, module)]
    long = [group for group in modules if any(slow(test) for test in group)]
    short = iter([test for group in modules if group not in long for test in group])
    ordered: list[Test] = []
    for i in range(parts):
        size = (len(tests) - len(ordered)) // (parts - i)
        part = [test for group in long[i::parts] for test in group]
        ordered += part
        ordered += [test for _, test in zip(range(size - len(part)), short, strict=False)]
    return ordered + list(short)
