"""Parameters of two networks that are to be aligned: the same names and shapes, all finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lsa.runtime.errors import InputError


def check_pair(names: Iterable[str], a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Refuse two networks whose parameters cannot be compared one by one.

    Args:
        names: Of the parameters that are compared.
        a: Parameters of one network by name, others among them.
        b: Parameters of the other.

    Raises:
        InputError: A parameter is missing, has another shape in the other network, or is not
            finite.
    """
    for name in names:
        if name not in a or name not in b:
            raise InputError(f"parameter {name!r} is missing; give both networks' parameters")
        if a[name].shape != b[name].shape:
            raise InputError(
                f"{name} has shapes {tuple(a[name].shape)} and {tuple(b[name].shape)}; align two "
                "networks of the same architecture"
            )
        if not (a[name].isfinite().all() and b[name].isfinite().all()):
            raise InputError(f"{name} is not finite; align two networks that did not diverge")
