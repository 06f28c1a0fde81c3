"""Hessian products that are exact where they can be, and otherwise by differences of gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsa.landscape.derivatives import products
from lsa.landscape.derivatives.modes import Matvec
from lsa.maths.differences import Derivative, Differences
from lsa.runtime.errors import InputError, first_line

SAME = 1e-2  # of exact products and differences, relative


class HessianProduct:
    """v ↦ Hv, `(d,)` or `(d, b)`, and what its error is.

    Args:
        exact: The exact product; None: it cannot be had.
        differences: Of gradients, made when they are needed.
        why: Why products shall be by differences; empty: only if the exact one is refused.
        remark: Called with a line on the error whenever that is known anew.
        wrong: Called with a line where exact products are not those of the gradient's differences.
    """

    def __init__(
        self,
        exact: Matvec | None,
        differences: Callable[[], Differences],
        why: str,
        remark: Callable[[str], None],
        wrong: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._exact, self._make, self._why, self._remark = exact, differences, why, remark
        self._wrong, self._compared = wrong, False
        self._differences: Differences | None = None
        self._tried = False  # the exact product, with success

    @property
    def noise(self) -> float:
        """The largest error of products with vectors of length 1; 0 while they are exact."""
        return self._differences.noise if self._differences else 0.0

    def __call__(self, v: Tensor) -> Tensor:
        """Hv, by one exact product or by two gradients."""
        if not self._why:
            assert self._exact
            if self._tried:
                return self._exact(v)
            try:
                product = self._exact(v)
            except products.UNKNOWN as error:
                self._why = refusal(error)
            else:
                self._tried = True
                return product
        if v.ndim == 1:
            return self._column(v)
        columns = [self._column(column) for column in v.reshape(len(v), -1).unbind(1)]
        return torch.stack(columns, 1).reshape(v.shape)

    def measured(self, v: Tensor) -> Derivative:
        """Hv for one vector `(d,)` as well as it can be had, and its error.

        Exactly where that fits; else by four gradients. Where products are by differences, the
        first exact one is compared with them: a kernel's second derivative may be wrong.
        """
        if self._exact:
            try:
                product = self._exact(v)
            except products.UNKNOWN as error:
                refusal(error)
                self._exact = None
            else:
                if not self._why or self._compared or self._is_right(product, v):
                    return Derivative(product, 0.0)
                self._exact = None
        return self._noted(self._made().measured(v), v)

    def _is_right(self, product: Tensor, v: Tensor) -> bool:
        """Whether an exact product along v is what differences give."""
        found = self._made().derivative(v)
        self._compared = True
        apart, size = float((product - found.value).norm()), float(found.value.norm())
        if apart <= SAME * size + 10 * found.error:
            return True
        off = apart / max(size, float(product.norm()))
        self._wrong(
            f"exact second derivatives of this network are {off:.1%} off differences of its "
            "gradient, and are not used"
        )
        return False

    def _column(self, v: Tensor) -> Tensor:
        return self._noted(self._made().derivative(v), v).value

    def _made(self) -> Differences:
        self._differences = self._differences or self._make()
        return self._differences

    def _noted(self, derivative: Derivative, v: Tensor) -> Derivative:
        self._remark(
            f"Hessian products are by differences of gradients, as {self._why}; their error was at "
            f"most {self._made().error:.1e} of the largest product"
        )
        return Derivative(derivative.value.to(v.dtype), derivative.error)


def refusal(error: BaseException) -> str:
    """The first line of what was raised where a derivative is lacking; raises all else."""
    products.check_unknown(error)
    return first_line(error).rstrip(".")


WAYS = ("auto", "exact", "gradients")


def checked(way: str) -> str:
    """How products shall be computed.

    Raises:
        InputError: None of the ways.
    """
    if way not in WAYS:
        raise InputError(f"products={way!r}; choose {', '.join(WAYS[:-1])} or {WAYS[-1]}")
    return way
