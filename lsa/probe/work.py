"""What a probe will cost, as its declaration says it: for the plan of a study."""

from __future__ import annotations

from dataclasses import dataclass

BASIS = 100  # vectors that a search holds, by default


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
    # Factors of the time between which checkpoints lie, where it depends on what is found there.
    spread: tuple[float, float] = (1.0, 1.0)
    rows: float = 0.0  # of a basis, of length d, from which a vector is made orthogonal


def lanczos_rows(products: float) -> float:
    """`Work.rows` of a Lanczos run of so many products: a basis that grows, and what else is done.

    A length, a new row, a Ritz vector and the Gram matrix at the end take a product's time of
    eight rows more.
    """
    return products * (min(products, BASIS) / 2 + 8)
