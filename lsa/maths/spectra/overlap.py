"""The overlap of two subspaces, each spanned by orthonormal columns."""

from __future__ import annotations

import torch
from torch import Tensor

from lsa.maths.spaces import LOCAL
from lsa.maths.spectra.krylov import gram_error
from lsa.runtime.errors import InputError


def subspace_overlap(U: Tensor, V: Tensor) -> float:
    """‖Uᵀ V‖_F² / k: mean squared cosine of the principal angles between two subspaces.

    1 when the smaller subspace lies within the other; max(k_U, k_V)/d on average for random ones.

    Args:
        U: Orthonormal columns, `(d, k_U)`.
        V: Orthonormal columns, `(d, k_V)`; k is the smaller of the two numbers of columns.

    Raises:
        InputError: Columns that are not orthonormal, or shapes that do not fit.
    """
    if U.ndim != 2 or V.ndim != 2 or len(U) != len(V):
        raise InputError(f"shapes {tuple(U.shape)} and {tuple(V.shape)}; give (d, k) and (d, l)")
    for matrix in (U, V):
        if not gram_error(matrix.T) < 1e-3:
            raise InputError("the columns are not orthonormal; take the Q of a QR decomposition")
    products = torch.stack([LOCAL.dots(U.T, v) for v in V.to(U).unbind(1)])
    return float(products.square().sum()) / min(U.shape[1], V.shape[1])
