"""What a probe will cost, as its declaration says it: for the plan of a study."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

BASIS = 100  # vectors that a search holds at most, by default
HELD = 10  # beside its basis, products and pairs included
POINT = 3  # rows, of making a point θ + a·u to evaluate

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """Size of a problem, from which a probe's cost is predicted."""

    dimension: int  # parameters
    samples: int  # of the landscape
    training: int  # samples of the whole training split
    validation: int
    parameters: tuple[str, ...] = ()  # their names
    optimizer: str = ""  # that trained the checkpoint; empty where several are meant
    # Heads, hidden layers and streams whose symmetries are tried, about; 0: no transformer.
    symmetric: float = 0.0
    apart: int = 0  # blocks more that `layers` makes of layers for queries, keys and values at once
    kept: bool = True  # the graphs of a product fit into memory, for the next one
    basis: float = math.inf  # bytes that a search may hold; with fewer vectors it restarts


@dataclass(frozen=True)
class Work:
    """The work of a probe, in evaluations of single samples."""

    losses: float = 0.0
    gradients: float = 0.0
    products: float = 0.0  # of the Hessian with a vector
    gauss_newton: float = 0.0  # products of the Gauss–Newton matrix with a vector
    covariance: float = 0.0  # products of the gradient covariance with a vector
    curvatures: float = 0.0  # of each sample along a vector
    vectors: int = 0  # of length d held at once
    width: int = 4  # bytes of a number
    rows: float = 0.0  # of a basis, of length d, from which a vector is made orthogonal
    # The same where a checkpoint is kinder and where it is harder; None: it depends on no such.
    least: Work | None = None
    most: Work | None = None


def between(work: Callable[[T], Work], counts: Sequence[T]) -> Work:
    """The work for the middle one of three counts, with those for the least and the most."""
    least, usual, most = map(work, counts)
    return replace(usual, least=least, most=most)


def lanczos_rows(products: float) -> float:
    """`Work.rows` of a Lanczos run of so many products: a basis that grows, and what else is done.

    A length, a new row, a Ritz vector and the Gram matrix at the end take a product's time of
    eight rows more.
    """
    return products * (min(products, BASIS) / 2 + 8)


def lanczos_vectors(products: float, at: Sizes, width: int = 4) -> int:
    """`Work.vectors` of a Lanczos run of so many products, with numbers of so many bytes."""
    return math.ceil(min(products, BASIS, at.basis / (at.dimension * width))) + HELD
