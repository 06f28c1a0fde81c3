"""The smallest eigenvalue by our Lanczos and by ARPACK, over one and the same product."""

from __future__ import annotations

from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from benchmarks import setting
from benchmarks.timing import timed
from lsa.maths.spectra import eigenpairs

TOL = 1e-3
Pair = tuple[float, Tensor]


def rows(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Per method: seconds, products, eigenvalue and residual."""
    at, theta = setting.landscape(model, x, y)
    hessian = at.hessian(theta)
    start = eigenpairs.start_vector(theta, torch.Generator().manual_seed(0))
    hessian(start)  # builds what is kept
    products = 0

    def counted(v: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return hessian(v)

    def ours() -> Pair:
        rng = torch.Generator().manual_seed(1)
        found = eigenpairs.lanczos(
            counted, start, rng=rng, largest=0, smallest=1, tol=TOL, confirm=0
        ).smallest
        return float(found.values[0]), found.vectors[:, 0]

    def arpack() -> Pair:
        operator = LinearOperator(
            (len(theta), len(theta)),
            matvec=lambda v: counted(torch.from_numpy(v).reshape(-1).to(theta)).cpu().numpy(),  # type: ignore[call-arg]
            dtype=start.cpu().numpy().dtype,
        )
        values, vectors = eigsh(operator, k=1, which="SA", tol=TOL, v0=start.cpu().numpy())
        return float(values[0]), torch.from_numpy(vectors[:, 0].copy()).to(theta)

    found = []
    for name, method in (("lsa", ours), ("ARPACK", arpack)):
        products = 0
        (value, vector), seconds = timed(method)
        spent = products
        residual = float((hessian(vector) - value * vector).norm() / abs(value))
        found.append(
            {
                "method": name,
                "seconds": seconds,
                "products": spent,
                "λ_min": value,
                "residual": residual,
            }
        )
    return found
