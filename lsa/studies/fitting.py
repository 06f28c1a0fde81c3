"""Whether a probe fits into the free memory, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from lsa.probe import Probe
from lsa.probe.declaration import Option
from lsa.probe.options import converted
from lsa.runtime import variables
from lsa.runtime.errors import InputError
from lsa.studies import cost

LEFT_OUT = ("no", "none")  # choices of an option that leave a part of the measurement out
# Variables of the environment that save memory, and what they change in the rates.
SETTINGS = {
    f"{variables.GRAPH_MEMORY}=0": {"spare": 0},
    f"{variables.CONSISTENCY}=off": {"check": 0.0},
}
LAST = "take parameters of some layers (parameters=… in Python), or a machine with more memory"


def shortfall(
    declared: Probe, options: Mapping[str, Any], measured: cost.Rates, free: float
) -> str:
    """What to change where a probe needs more memory than there is; empty where it fits.

    Args:
        declared: The probe.
        options: All of its options, resolved.
        measured: Of the landscape that it would measure.
        free: Bytes that the process may hold, with those that it holds already.
    """

    def peak(changed: Mapping[str, Any], at: cost.Rates = measured) -> int:
        estimate = cost.probing(declared, {**options, **changed}, at)
        return estimate.memory if estimate else 0

    if peak({}) <= free:
        return ""
    said = f"{declared.name} would not fit: {free / 1e9:.1f} GB are free for its process"
    ways, most, bare = [], {}, dataclasses.replace(measured, check=0.0)
    for name, option in declared.options.items():
        for value in _smaller(option, options[name]):
            if (less := peak({name: value})) <= free:
                ways.append(f"{_flag(name)} {value} ({less / 1e9:.1f} GB)")
                break
            if peak({name: value}, bare) < peak({}, bare):
                most[name] = value
    lighter = measured
    for setting, changed in SETTINGS.items():
        if (less := peak({}, dataclasses.replace(measured, **changed))) <= free:
            ways.append(f"{setting} ({less / 1e9:.1f} GB)")
        lighter = dataclasses.replace(lighter, **changed)
    if not ways and (less := peak(most, lighter)) <= free:
        together = [*(f"{_flag(name)} {value}" for name, value in most.items()), *SETTINGS]
        ways.append(f"{', '.join(together)} together ({less / 1e9:.1f} GB)")
    if not ways:
        return f"{said}, and no option makes it fit; {LAST}"
    return f"{said}; it would with {', or '.join(ways)}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _smaller(option: Option, value: Any) -> Iterator[Any]:
    """Values of an option that take less memory, the nearest first, as far as its rules allow."""
    if isinstance(value, str):
        tried: list[Any] = [word for word in LEFT_OUT if word in get_args(option.type)]
    elif option.type is int:
        tried = [value >> i for i in range(1, value.bit_length() + 1)]
    else:
        tried = []
    for smaller in tried:
        try:
            yield converted(option.type, smaller, option.name, option.default, option.rules)
        except InputError:
            continue
