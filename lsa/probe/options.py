"""The values that an option of a probe takes, from YAML, a command line or Python."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from lsa.runtime.errors import InputError


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


# Text that holds a number is taken: `mlflow run` passes text.
NUMBERS: dict[Any, Any] = {
    int: Annotated[int, BeforeValidator(_no_boolean), Field(ge=-(2**63), lt=2**63)],
    float: Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)],
}


def _odd(points: int) -> int:
    if points % 2 == 0:
        raise ValueError(f"odd, such as {points + 1}")
    return points


# The rule of a grid that has a point in its middle.
ODD = AfterValidator(_odd)


def converted(kind: Any, value: Any, name: str, default: Any, rules: tuple[Any, ...] = ()) -> Any:
    """A value of an option, as the type and within the rules that the option declares.

    Args:
        kind: That type.
        value: What was given.
        name: What messages call the option.
        default: Of the option, for the message.
        rules: Those of pydantic that a value keeps, as `Field(ge=1)`.

    Raises:
        InputError: A value of another type, `True` for a number, a number that is not finite, or
            one that breaks a rule.
    """
    if isinstance(value, bool) and "yes" in get_args(kind):
        value = "yes" if value else "no"  # YAML reads the bare words as booleans
    kind = NUMBERS.get(kind, kind)
    for rule in rules:
        kind = Annotated[kind, rule]
    try:
        return pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError as error:
        raise InputError(
            f"{name}={value!r} must be {broken_rule(error)}; the default is {default!r}"
        ) from None


def broken_rule(error: pydantic.ValidationError) -> str:
    """The first rule that a value breaks, as the end of a sentence."""
    text = error.errors()[0]["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    text = re.sub(r" after validation, not \d+$", "", text)
    return re.sub(r"^([A-Z]\w*) should have ", lambda kind: f"a {kind[1].lower()} of ", text)
