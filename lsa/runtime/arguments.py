"""Arguments of the Python interface, checked before a run begins: one plain line for each."""

from __future__ import annotations

import operator
import os
from typing import Any

from lsa.runtime.errors import InputError


def text(name: str, value: Any) -> str:
    """Text, also where a path is given.

    Raises:
        InputError: It is neither.
    """
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    raise InputError(f"{name}={value!r} is a {type(value).__name__}; give text or a path")


def optional_text(name: str, value: Any) -> str | None:
    """`text`, or None."""
    return None if value is None else text(name, value)


def whole_number(name: str, value: Any, *, least: int = 0) -> int:
    """A whole number of at most 63 bits, also one of NumPy's.

    Raises:
        InputError: It is none, or below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number < 2**63:
        raise InputError(f"{name}={value!r} must be a whole number, at least {least}")
    return number


def names(name: str, value: Any) -> tuple[str, ...]:
    """Several names; text holds them with commas between, as on the command line.

    Raises:
        InputError: It holds something else.
    """
    if isinstance(value, str):
        return tuple(filter(None, value.split(",")))
    try:
        return tuple(text(name, item) for item in value)
    except TypeError:
        raise InputError(f"{name}={value!r} must be names, such as ['my_nets']") from None
