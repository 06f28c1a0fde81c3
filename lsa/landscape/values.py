"""Loss, gradient and per-sample values of a landscape, from the parts of a pass over its data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsa.landscape.derivatives import curvatures as sample_curvatures
from lsa.landscape.derivatives import jacobians, modes, slopes
from lsa.landscape.derivatives.parts import Part
from lsa.landscape.network import Network


@dataclass(frozen=True)
class Evaluation:
    """Loss and misclassification rate on a split, each with its standard error over the samples."""

    loss: float
    loss_error: float
    error: float  # fraction misclassified; nan when the task is not classification
    error_error: float


@torch.no_grad()
def loss(parts: Iterable[Part], theta: Tensor) -> Tensor:
    """L(θ), `()` in float64."""
    total = torch.zeros((), dtype=torch.float64, device=theta.device)
    for part in parts:
        total += part.weight * part.loss(theta).double()
    return total


@torch.no_grad()
def per_sample(parts: Iterable[Part], theta: Tensor) -> tuple[Tensor, Tensor | None]:
    """ℓᵢ(θ) `(N,)`, and whether a classifier takes the sample for another class, `(N,)` or None."""
    losses, wrong = Rows(), Rows()
    for part in parts:
        values, outputs = part.both(theta)
        losses.add(values)
        wrong.add(part.wrong(outputs))
    return losses.joined(), wrong.known


@torch.enable_grad()
def loss_and_gradient(parts: Iterable[Part], theta: Tensor) -> tuple[Tensor, Tensor]:
    """L(θ) in float64 and ∇L(θ) `(d,)`, summed in float64."""

    def of(part: Part) -> tuple[Tensor, Tensor]:
        t = theta.detach().requires_grad_()
        value = part.loss(t)
        return value.detach().double(), modes.gradient(value, t)

    rest = iter(parts)
    first = next(rest)
    value, gradient = of(first)
    if first.weight == 1:  # the only one, so there is nothing to sum
        return value, gradient
    total, sum_ = first.weight * value, gradient.double().mul_(first.weight)
    for part in rest:
        value, gradient = of(part)
        sum_.add_(gradient, alpha=part.weight)
        total += part.weight * value
    return total, sum_.to(theta.dtype)


@torch.enable_grad()
def add_gradient(
    parts: Iterable[Part], theta: Tensor, total: Tensor | None, sign: float, network: Network
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the loss to a total.

    With one part, the gradient of each parameter is added as soon as it is computed. With several
    parts the sum is taken in float64.

    Args:
        parts: Of the data.
        theta: θ `(d,)`.
        total: `(d,)`, which is overwritten; zeros if None. In float64 where there are several
            parts.
        sign: 1 or −1.
        network: The network, whose parameters are θ.

    Returns:
        L(θ), a float64 scalar, and total + sign · ∇L(θ).
    """
    parts = iter(parts)
    first, second = next(parts), next(parts, None)
    loss = torch.zeros((), dtype=torch.float64, device=theta.device)
    several = second is not None
    if total is None:
        total = torch.zeros_like(theta, dtype=torch.float64 if several else theta.dtype)
    own = torch.zeros_like(theta, requires_grad=False) if several else total
    with network.gathering(own) as backward:
        for part in itertools.chain([first] if second is None else [first, second], parts):
            value = part.loss(theta) * part.weight
            loss += value.detach().double()
            backward(value * sign)
            if several:
                total.add_(own)
                own.zero_()
    return loss, total


def per_sample_and_slopes(
    parts: Iterable[Part], theta: Tensor, u: Tensor, *, singly: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Losses, mistakes and slopes ∇ℓᵢ(θ)·u of each sample, from one pass.

    Args:
        parts: Of the data.
        theta: θ `(d,)`.
        u: Direction `(d,)`.
        singly: By one backward pass for each sample.

    Returns:
        `(N,)` each; None for the mistakes where the targets are no classes.
    """
    losses, wrong, sloped = Rows(), Rows(), Rows()
    way = slopes.by_single_gradients if singly else slopes.by_any_way
    for part in parts:
        values, outputs, slope = way(part.both, theta, u.to(theta.dtype))
        losses.add(values)
        wrong.add(part.wrong(outputs))
        sloped.add(slope)
    return losses.joined(), wrong.known, sloped.joined()


def curvatures(parts: Iterable[Part], theta: Tensor, u: Tensor, *, by_layers: bool) -> Tensor:
    """Per-sample curvatures uᵀ∇²ℓᵢ(θ)u, `(N,)`.

    Args:
        parts: Of the data.
        theta: θ `(d,)`.
        u: Direction `(d,)`.
        by_layers: Whether to step along u in each layer by itself where that is right, which is
            cheaper.
    """
    curvature = Rows()
    for part in parts:
        given = part.losses, theta, u, part.samples
        curved = sample_curvatures.by_layers(*given) if by_layers else None
        curvature.add(sample_curvatures.by_one_step(*given) if curved is None else curved)
    return curvature.joined()


def gauss_newton_curvatures(
    parts: Iterable[Part], theta: Tensor, u: Tensor, *, by_graph: bool = False
) -> Tensor:
    """Per-sample curvatures (Jᵢu)ᵀ∇²ℓᵢ(Jᵢu) of the Gauss–Newton part, `(N,)`.

    Args:
        parts: Of the data.
        theta: θ `(d,)`.
        u: Direction `(d,)`.
        by_graph: Not by forward mode.
    """
    curvature = Rows()
    for part in parts:
        curvature.add(_curved(part, theta, u.to(theta.dtype), by_graph))
    return curvature.joined()


def _curved(part: Part, theta: Tensor, u: Tensor, by_graph: bool) -> Tensor:
    if part.outputs is None or part.losses_of is None:
        return jacobians.traced_curvatures(part, theta, u)
    with torch.no_grad():
        outputs = part.outputs(theta)
    moved = _moved(part.outputs, theta, u, by_graph)
    losses_of = part.losses_of
    return jacobians.second_derivatives(
        lambda alpha: losses_of(outputs + alpha * moved), part.samples, theta
    )


def _moved(outputs: modes.Function, theta: Tensor, u: Tensor, by_graph: bool) -> Tensor:
    """Derivative of the outputs along u; by a graph where an operation has no forward mode."""
    if by_graph:
        return jacobians.Jacobian(outputs, theta).push(u)
    try:
        return modes.directional_derivative(outputs, theta.detach(), u)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return jacobians.Jacobian(outputs, theta).push(u)


def evaluation(losses: Tensor, wrong: Tensor | None) -> Evaluation:
    """Means of losses `(N,)` and mistakes `(N,)`, with standard errors over the samples."""
    value, error = _mean_and_error(losses.double())
    if wrong is None:
        return Evaluation(value, error, float("nan"), float("nan"))
    return Evaluation(value, error, *_mean_and_error(wrong.double()))


def misclassified(outputs: Tensor, y: Tensor) -> Tensor | None:
    """Whether each sample is taken for another class, `(n,)`; None for no classes."""
    if not isinstance(outputs, Tensor) or not isinstance(y, Tensor):
        return None
    classes = outputs.ndim == 2 and outputs.shape[1] > 1  # one column says no class
    labels = y.ndim == 1 and not y.is_floating_point() and not y.is_complex()
    return outputs.argmax(1) != y.long() if classes and labels else None


class Rows:
    """Per-sample values of all parts, in one tensor that doubles when it is full.

    Many small tensors, kept between large ones that come and go, would scatter the memory: a
    stream of 200 batches then took a third more than one of two.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self._n = 0

    def add(self, rows: Tensor | None) -> None:
        """Append the rows `(n, …)` of one part; None for a part without values."""
        if rows is None:
            return
        rows = rows.detach()  # a network that takes gradients itself leaves a graph
        end = self._n + len(rows)
        if self._held is None or end > len(self._held):
            larger = rows.new_empty((2 * end, *rows.shape[1:]))
            if self._held is not None:
                larger[: self._n] = self._held[: self._n]
            self._held = larger
        self._held[self._n : end] = rows
        self._n = end

    @property
    def known(self) -> Tensor | None:
        """All rows `(N, …)`; None where nothing is known of any."""
        return None if self._held is None else self._held[: self._n].clone()

    def joined(self) -> Tensor:
        """All rows `(N, …)`."""
        rows = self.known
        assert rows is not None
        return rows


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error; nan error for a single value."""
    n = len(values)
    error = (values.std() / n**0.5).item() if n > 1 else float("nan")
    return values.mean().item(), error
