"""Products of curvature and noise matrices of L(θ) = ∑ₖ wₖ Lₖ(θ) with vectors.

The parts Lₖ are the chunks of a split. Products are reverse mode through graphs that outlive one
product: what does not depend on the vector, the forward and the first backward pass, is
computed once for as many parts as fit a given memory, and again at every product for the others.
What is kept changes no number. On a GPU a product is recorded and replayed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad as gradient_of
from torch.func import vmap

from lsa.landscape.derivatives import budget, sample_gradients
from lsa.landscape.derivatives.jacobians import Jacobian, Traced, is_adjoint, jacobian
from lsa.landscape.derivatives.layer_gradients import SampleGradients, size
from lsa.landscape.derivatives.modes import (
    AddProduct,
    Function,
    Matvec,
    differentiable,
    double_backward,
    double_backward_by_parts,
    pull_back,
)
from lsa.landscape.derivatives.parts import Part
from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.derivatives.replay import replayed
from lsa.landscape.network import Network
from lsa.runtime.errors import InputError

Graph = TypeVar("Graph")


def hessian(parts: Iterable[Part], theta: Tensor, memory: int) -> Matvec:
    """v ↦ H v with H = ∇²L; `(d,)` or `(d, b)`.

    Several parts are summed in float64.

    Args:
        parts: Of the split.
        theta: Where.
        memory: Bytes that may be kept.

    Raises:
        InputError: From the first product, where the graph of a pass would not fit in the memory
            that is free.
    """
    multiply = _graphs(lambda _, part: double_backward(part.loss, theta), theta, memory)

    @full_float32()
    @torch.enable_grad()
    def product(v: Tensor) -> Tensor:
        columns = [c.contiguous() for c in v.to(theta.dtype).reshape(len(v), -1).unbind(1)]
        if isinstance(parts, list) and len(parts) == 1:
            matvec, weight = multiply(0, parts[0]), parts[0].weight
            made = [matvec(column) * weight for column in columns]
            return torch.stack(made, 1).reshape(v.shape).to(v.dtype)
        total = torch.zeros(len(columns), len(v), dtype=torch.float64, device=v.device)
        for k, part in enumerate(parts):
            matvec = multiply(k, part)
            for sum_, column in zip(total, columns, strict=True):
                sum_.add_(matvec(column), alpha=part.weight)
        return total.T.reshape(v.shape).to(v.dtype)

    return _recorded(product, parts, theta)


def hessian_by_parts(parts: Iterable[Part], theta: Tensor, memory: int, network: Network) -> Matvec:
    """v ↦ H v, `(d,)` or `(d, b)`, where each part of θ is a leaf; batches are read every time.

    One batch is added up where it arises, in the precision of θ; several are summed in float64.

    Args:
        parts: Of the split.
        theta: θ `(d,)`.
        memory: Bytes that may be kept.
        network: Whose parameters the parts of θ are.

    Raises:
        InputError: From the first product, where an operation has no second derivative, or the
            graph of a pass would not fit in the memory that is free.
    """
    add = _graphs(lambda _, part: _by_parts(part, theta, network), theta, memory)

    @full_float32()
    @torch.enable_grad()
    def product(v: Tensor) -> Tensor:
        columns = v.to(theta.dtype).reshape(len(v), -1).unbind(1)
        rows = iter(enumerate(parts))
        first, second = next(rows), next(rows, None)
        several = [] if second is None else [second]
        dtype = torch.float64 if several else theta.dtype
        totals = [torch.zeros_like(theta, dtype=dtype, requires_grad=False) for _ in columns]
        own = torch.zeros_like(theta, requires_grad=False) if several else None
        for k, part in itertools.chain([first], several, rows):
            multiply, last = add(k, part), None if add.holds(k) else totals[-1]
            for total, column in zip(totals, columns, strict=True):
                column = column.contiguous()  # which some kernels ask of a cotangent
                multiply(column, total if own is None else own, total is not last)
                if own is None:
                    total.mul_(part.weight)
                else:
                    total.add_(own, alpha=part.weight)
                    own.zero_()
            del multiply  # before the next graph is made
        total = totals[0] if v.ndim == 1 else torch.stack(totals, 1).reshape(v.shape)
        return total.to(v.dtype)

    return product


def _by_parts(part: Part, theta: Tensor, network: Network) -> AddProduct:
    with network.parted():
        return double_backward_by_parts(part.loss, theta.detach(), lambda: network.values)


@torch.enable_grad()
def saved(function: Function, theta: Tensor) -> int:
    """Bytes that a pass through a function of θ `(d,)` saves for its gradient, θ left out."""
    t = theta.detach().requires_grad_()
    return max(1, _weighed(lambda: function(t))[1] - t.nbytes)


@torch.enable_grad()
def graph_size(part: Part, theta: Tensor) -> int:
    """Bytes that `hessian` keeps of a part at θ `(d,)`."""
    return _weighed(lambda: double_backward(part.loss, theta))[1]


def gauss_newton(parts: Iterable[Part], theta: Tensor, memory: int) -> Matvec:
    """v ↦ G v, `(d,)`, with G = ∑ₖ wₖ Jₖᵀ ∇²Lₖ Jₖ (Schraudolph 2002), ∇² by the outputs.

    Args:
        parts: Of the split.
        theta: θ `(d,)`.
        memory: Bytes that may be kept.
    """

    checked: list[bool] = []

    def build(_: int, part: Part) -> Jacobian | Traced:
        outputs = part.outputs
        made = Traced(part, theta) if outputs is None else Jacobian(outputs, theta)
        if not checked and not is_adjoint(made, theta):
            raise InputError(
                "there is no Gauss–Newton part: derivatives of the outputs are not those of the "
                "gradient, as where hooks or custom functions change gradients"
            )
        checked.append(True)
        return made

    linearised = _Kept(build, memory, _weighed)

    def curved(k: int, part: Part, v: Tensor) -> Tensor:
        J = linearised(k, part)
        if isinstance(J, Traced):
            return J.curved(v)
        assert part.loss_of is not None
        o = J.value.detach().requires_grad_()
        (g,) = grad(part.loss_of(o), o, create_graph=True)
        return J.pull(pull_back(differentiable(g), o, J.push(v)))

    return _summed(parts, theta, curved, lambda part: part.weight)


def second_moment(
    parts: Iterable[Part],
    theta: Tensor,
    memory: int,
    *,
    samples: int,
    by_layers: bool,
    singly: bool = False,
) -> tuple[Matvec, Callable[[], Tensor]]:
    """v ↦ 1/N ∑ᵢ gᵢ gᵢᵀ v over the per-sample gradients gᵢ = ∇ℓᵢ(θ), v `(d,)`, and their mean.

    Args:
        parts: Of the split.
        theta: Where.
        memory: Bytes that may be kept.
        samples: N.
        by_layers: Take the gᵢ of each layer as `sample_gradients` does where it knows them. Kept in
            the form of fast products as far as memory allows.
        singly: Else by one backward pass for each sample, where a graph of the gradient is wrong.
    """
    graph = False if singly else None  # whether a graph of the gradients is right; None: not seen
    known: dict[int, bool] = {}  # part ↦ whether its gradients are known by layers

    def build(k: int, part: Part) -> SampleGradients | Jacobian:
        nonlocal graph
        found = None
        if known.get(k, by_layers):
            found = sample_gradients.of(part.losses, theta, check=k not in known)
            known[k] = found is not None
        if found is not None:
            return found
        if graph is False:
            return sample_gradients.one_by_one(part.losses, theta)
        made = jacobian(part.losses, theta, check=graph is None)
        graph = isinstance(made, Jacobian)
        return made

    def weighed(
        make: Callable[[], SampleGradients | Jacobian],
    ) -> tuple[SampleGradients | Jacobian, int]:
        made, size = _weighed(make)
        if isinstance(made, Jacobian):
            return made, size
        made = made.faster(memory / samples * made.n)
        return made, made.nbytes

    gradients = _Kept(build, memory, weighed)

    @full_float32()
    @torch.enable_grad()
    def mean() -> Tensor:
        total = torch.zeros_like(theta, dtype=torch.float64)
        for k, part in enumerate(parts):
            each = theta.new_full((part.samples,), 1 / part.samples)
            total.add_(gradients(k, part).pull(each), alpha=part.share)
        return total.to(theta.dtype)

    def averaged(k: int, part: Part, v: Tensor) -> Tensor:
        return gradients(k, part).normal(v) / part.samples

    return _summed(parts, theta, averaged, lambda part: part.share), mean


def _summed(
    parts: Iterable[Part],
    theta: Tensor,
    multiply: Callable[[int, Part, Tensor], Tensor],
    weight: Callable[[Part], float],
) -> Matvec:
    """v ↦ ∑ₖ wₖ Mₖ v, and `multiply` is (k, part, v) ↦ Mₖ v."""

    @full_float32()
    @torch.enable_grad()
    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v, dtype=torch.float64)
        for k, part in enumerate(parts):
            total.add_(multiply(k, part, v.to(theta.dtype)), alpha=weight(part))
        return total.to(v.dtype)

    return _recorded(product, parts, theta)


def _recorded(product: Matvec, parts: Iterable[Part], theta: Tensor) -> Matvec:
    """The product, recorded on a GPU where its parts are fixed; batches are read and checked."""
    return replayed(product, theta.device) if isinstance(parts, list) else product


def sample_rows(
    part: Part, theta: Tensor, size: int, *, by_layers: bool, singly: bool = False
) -> Iterator[Tensor]:
    """Per-sample gradients of a part in blocks of at most `size` rows `(n, d)`.

    Args:
        part: Some samples.
        theta: θ `(d,)`.
        size: Most rows of a block.
        by_layers: Take them from the layers, where these are known; else by `vmap` over samples
            that can be parted, or one by one.
        singly: Not by `vmap`.
    """
    known = sample_gradients.of(part.losses, theta) if by_layers else None
    if known is not None:
        yield from (block.rows() for block in known.split(size))
        return
    indices = torch.arange(part.samples, device=theta.device).split(size)
    if part.alone is not None and not singly:
        try:
            each = vmap(gradient_of(part.alone), in_dims=(None, 0))
            yield from [each(theta, index) for index in indices]
            return
        except UNKNOWN as error:
            check_unknown(error)
    yield from sample_gradients.rows_one_by_one(part.losses, theta, size)


UNWEIGHED = 1 << 62  # bytes of a graph that cannot be weighed, and is not kept

UNKNOWN = (RuntimeError, NotImplementedError, TypeError, InputError)
"""What torch and lsa raise where an operation lacks a derivative."""


def check_unknown(error: BaseException) -> None:
    """Raise an error that says more than that a derivative is lacking.

    Raises:
        OutOfMemoryError: The error, if it is one.
        InputError: The error, if it is of something else than a second derivative.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if isinstance(error, InputError) and "second derivative" not in str(error):
        raise error


class _Kept(Generic[Graph]):
    """`build` of part k, remembered while the bytes that all hold, as `weighed` says, fit.

    The first is weighed in any case, so that one that would not fit is refused.
    """

    def __init__(
        self,
        build: Callable[[int, Part], Graph],
        memory: int,
        weighed: Callable[[Callable[[], Graph]], tuple[Graph, int]],
    ) -> None:
        self._build, self._left, self._weighed = build, memory, weighed
        self._graphs: dict[int, Graph] = {}
        self._known = False

    def __call__(self, k: int, part: Part) -> Graph:
        if k in self._graphs:
            return self._graphs[k]
        if self._left <= 0 and self._known:
            return self._build(k, part)
        made, size = self._weighed(lambda: self._build(k, part))
        self._known = True
        self._left -= size
        if self._left >= 0:
            self._graphs[k] = made
        return made

    def holds(self, k: int) -> bool:
        """Whether that of part k is remembered."""
        return k in self._graphs


def _graphs(build: Callable[[int, Part], Graph], theta: Tensor, memory: int) -> _Kept[Graph]:
    """Graphs of parts, of which each must fit in the memory that is free where θ lies."""
    return _Kept(build, memory, lambda made: _weighed(made, budget.room(theta.device)))


def _weighed(build: Callable[[], Graph], most: float = math.inf) -> tuple[Graph, int]:
    """A graph, and the bytes that it holds for its backward pass.

    Raises:
        InputError: It holds more bytes than `most`; said before it is complete.
    """
    held: list[Tensor] = []
    storages: set[int] = set()
    bytes_held = 0

    def note(tensor: Tensor) -> tuple[Tensor, int]:
        nonlocal bytes_held
        held.append(tensor.detach())
        storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
        if storage is not None and storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            bytes_held += storage.nbytes()
        if bytes_held > most:
            raise InputError(
                f"an exact second derivative takes over {most / 1e9:.2g} GB, half of the memory "
                "that is free"
            )
        # An output itself would hold the node that holds it, for ever.
        return held[-1], tensor._version

    def unchanged(noted: tuple[Tensor, int]) -> Tensor:
        """The tensor, with the check that torch leaves out where there are hooks."""
        tensor, version = noted
        if tensor._version != version:
            raise RuntimeError(
                "a tensor that the gradient needs has been modified by an inplace operation"
            )
        return tensor

    try:
        with saved_tensors_hooks(note, unchanged):
            made = build()
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        return build(), UNWEIGHED  # the network calls torch.func itself
    bytes_of_graph = size(held)
    held.clear()  # the graph's nodes hold the hook, and it this list
    return made, bytes_of_graph
