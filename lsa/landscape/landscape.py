"""The landscape L(θ) of one network, one loss and one fixed data split, and its derivatives.

θ is flat, shape `(d,)`: the trainable parameters in `named_parameters()` order. Every quantity is
that of the *whole* split in evaluation mode: chunks are weighted by their size, sums run in
float64, and neither the caller's model nor any random state is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsa.landscape.derivatives import (
    batch_norm,
    budget,
    curvatures,
    modes,
    products,
    sample_gradients,
    slopes,
)
from lsa.landscape.derivatives.modes import Matvec
from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.derivatives.replay import replayed
from lsa.runtime.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]
BatchGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

FEW = 8  # samples on which the size of a pass is measured
GRADIENTS = 1 << 26  # numbers that a block of per-sample gradients may hold


def flatten(model: nn.Module) -> Tensor:
    """Trainable parameters of `model` as one vector θ, a detached copy of shape `(d,)`."""
    return torch.cat([p.detach().reshape(-1) for _, p in _trainable(model)])


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@dataclass(frozen=True)
class Evaluation:
    """Loss and misclassification rate on a split, each with its standard error over the samples."""

    loss: float
    loss_error: float
    error: float  # fraction misclassified; nan when the task is not classification
    error_error: float


IGNORED = -100  # the class that `F.cross_entropy` leaves out


class Landscape:
    """L(θ) = 1/N ∑ᵢ ℓ(f(θ, xᵢ), yᵢ) with gradient, curvature and gradient-noise products.

    Args:
        model: Network f. It is copied, and evaluated in `eval()` mode: dropout off, batch norm on
            its running statistics, so that L is one fixed function of θ.
        x: Inputs, shape `(N, …)`, on the device where the work shall happen.
        y: Targets, shape `(N, …)`.
        loss: ℓ as an unweighted mean over a batch, `(outputs, targets) -> scalar`.
        chunk: Samples per pass; bounds memory, changes the result by rounding. Default that of
            `lsa.configure`, else what a CPU's cache holds, or what fills a GPU within an eighth of
            its free memory.
        memory: Bytes that graphs may hold from one product to the next, which then costs up to a
            third less; changes the result by rounding. Default that of `lsa.configure`, else half
            of the free memory, less for a process that does not use all cores.
        layout: How images lie in memory, `channels_last` or `contiguous`; changes the result by
            rounding. Default that of `lsa.configure`, else `channels_last`, the faster one on every
            machine tried.

    Raises:
        InputError: No samples, inputs and targets of different number, chunk below 1, an unknown
            layout, or batch norm without running statistics, whose loss depends on the chunk.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: Loss = F.cross_entropy,
        *,
        chunk: int | None = None,
        memory: int | None = None,
        layout: str | None = None,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk={chunk} holds no sample; choose chunk ≥ 1")
        if layout is not None and layout not in budget.LAYOUTS:
            raise InputError(f"layout={layout!r}; choose {' or '.join(budget.LAYOUTS)}")
        batch_norm.check_statistics(model)
        self._own = dict(_trainable(model))
        self.model = copy.deepcopy(model).to(x.device).eval()
        self.loss_function = loss
        fixed = budget.settings()
        self._chunk = fixed.chunk if chunk is None else chunk
        self._memory = fixed.memory if memory is None else memory
        self.layout = layout or fixed.layout or next(iter(budget.LAYOUTS))
        self._saved: dict[object, float] = {}  # by a sample's shape: bytes that its pass saves
        self._index()
        self._place(x, y)

    def _index(self) -> None:
        named = _trainable(self.model)
        self._names = [name for name, _ in named]
        self._shapes = [p.shape for _, p in named]
        self._sizes = [p.numel() for _, p in named]

    def _place(self, x: Tensor, y: Tensor) -> None:
        if len(x) != len(y) or len(x) == 0:
            raise InputError(
                f"{len(x)} inputs and {len(y)} targets; give as many of each, at least 1"
            )
        self.x = self._laid_out(x)
        self.y = y
        self.chunk = self._chunk or self._pass_size(x)

    def _laid_out(self, x: Tensor) -> Tensor:
        return budget.laid_out(x, budget.image_layout(self.model, x, self.layout))

    def _pass_size(self, x: Tensor) -> int:
        if x.device.type != "cuda":
            return budget.cache_size(self.model, x)
        key = (x.shape[1:], x.dtype)
        if key not in self._saved:
            few = self._laid_out(x[:FEW])
            size = products.saved(partial(self.outputs, x=few), flatten(self.model))
            self._saved[key] = size / len(few)
        return budget.card_size(self._saved[key], x.device)

    @property
    def graph_memory(self) -> int:
        """Bytes that the graphs of products may hold now."""
        return budget.graph_memory(self.x.device) if self._memory is None else self._memory

    # --- the vector θ ----------------------------------------------------------------------------

    @property
    def dimension(self) -> int:
        """Number d of trainable parameters."""
        return sum(self._sizes)

    @property
    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters that θ is made of, in its order, as the caller's model holds them."""
        return [self._own[name] for name in self._names]

    @property
    def n_samples(self) -> int:
        """Number N of samples in the split."""
        return len(self.x)

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """θ `(d,)` as named views with the parameters' shapes."""
        parts = theta.split(self._sizes)
        return {n: p.view(s) for n, p, s in zip(self._names, parts, self._shapes, strict=True)}

    # --- other landscapes of the same network ----------------------------------------------------

    def with_data(self, x: Tensor, y: Tensor) -> Landscape:
        """The same network and loss on other samples."""
        other = copy.copy(self)
        other._place(x, y)
        return other

    def subset(self, indices: Tensor) -> Landscape:
        """The same network and loss on some of the samples."""
        return self.with_data(self.x[indices], self.y[indices])

    def with_model(self, model: nn.Module) -> Landscape:
        """The same data and loss with a copy of another model of the same architecture."""
        return type(self)(
            model,
            self.x,
            self.y,
            self.loss_function,
            chunk=self._chunk,
            memory=self._memory,
            layout=self.layout,
        )

    def with_memory(self, memory: int) -> Landscape:
        """The same landscape whose graphs may hold so many bytes."""
        other = copy.copy(self)
        other._memory = memory
        return other

    def restricted(self, theta: Tensor, names: Collection[str]) -> Landscape:
        """L as a function of the named parameters alone, the others fixed at θ.

        Its Hessian is a diagonal block of H, and costs less: no backward pass goes deeper than the
        named parameters do. Where it starts, `flatten(restricted.model)` is their part of θ.

        Raises:
            InputError: No names, or a name that is no trainable parameter's.
        """
        unknown = sorted(set(names) - set(self._names))
        if unknown or not names:
            raise InputError(
                f"no parameter is named {', '.join(unknown) or 'at all'}; "
                f"choose from {', '.join(self._names)}"
            )
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, value in self.unflatten(theta).items():
                other.model.get_parameter(name).copy_(value).requires_grad_(name in names)
        other._index()
        return other

    def double(self) -> Landscape:
        """The same landscape in float64, for differences that float32 would lose; θ in float64."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model).double()
        other.x, other.y = (t.double() if t.is_floating_point() else t for t in (self.x, self.y))
        return other

    @full_float32()
    def recalibrated(self, theta: Tensor) -> Landscape:
        """This landscape with batch-norm statistics re-estimated at θ on its own data.

        Needed at every interpolated θ (Jordan et al. 2023, arXiv 2211.08403). Returns self when
        the model tracks no statistics.
        """
        if not batch_norm.tracks_statistics(self.model):
            return self
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, value in self.unflatten(theta).items():
                other.model.get_parameter(name).copy_(value)
        batch_norm.recalibrate(other.model, self.x)
        return other

    def on_batch_statistics(self) -> Landscape:
        """This landscape with batch norm on the statistics of the samples in hand, one chunk.

        For mini-batches: the gradient then contains how the statistics depend on θ. Returns self
        when there is no batch norm.
        """
        if not batch_norm.layers(self.model):
            return self
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        batch_norm.use_batches(other.model)
        other._chunk = other.chunk = self.n_samples
        return other

    # --- values ----------------------------------------------------------------------------------

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """Network outputs f(θ, x)."""
        with _plain_attention():
            return functional_call(self.model, self.unflatten(theta), (x,))

    def _chunks(self) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Weight, inputs and targets of each chunk; the weights sum to one."""
        for x, y in zip(self.x.split(self.chunk), self.y.split(self.chunk), strict=True):
            yield len(x) / self.n_samples, x, y

    def _chunk_loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_function(self.outputs(theta, x), y)

    def _sample_losses(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self._losses_and_outputs(theta, x, y)[0]

    def _losses_and_outputs(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.outputs(theta, x)
        return self._losses_of(outputs, y), outputs

    @full_float32()
    @torch.no_grad()
    def loss(self, theta: Tensor) -> float:
        """L(θ)."""
        total = torch.zeros((), dtype=torch.float64, device=theta.device)
        for weight, x, y in self._chunks():
            total += weight * self._chunk_loss(theta, x, y).double()
        return total.item()

    def losses(self, theta: Tensor) -> Tensor:
        """Per-sample losses ℓᵢ(θ), shape `(N,)`."""
        return self.per_sample(theta)[0]

    @full_float32()
    @torch.no_grad()
    def per_sample(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss of each sample, and whether a classifier takes it for another class, `(N,)` each.

        The second is None where the task is not classification.
        """
        losses, wrong = [], []
        for _, x, y in self._chunks():
            outputs = self.outputs(theta, x)
            losses.append(self._losses_of(outputs, y))
            wrong.append(_wrong(outputs, y))
        return torch.cat(losses), _joined(wrong)

    def evaluate(self, theta: Tensor) -> Evaluation:
        """Loss and error with standard errors over the N samples."""
        losses, wrong = self.per_sample(theta)
        loss, loss_error = _mean_and_error(losses.double())
        if wrong is None:
            return Evaluation(loss, loss_error, float("nan"), float("nan"))
        return Evaluation(loss, loss_error, *_mean_and_error(wrong.double()))

    def _losses_of(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.loss_function is F.cross_entropy and outputs.ndim == 2 and y.ndim == 1:
            # A twelfth of the time of `vmap`, which is 2 to 3 % of a forward pass of simple_cnn. A
            # class that the mean leaves out has no loss of its own: 0/0, as its mean alone is.
            return F.cross_entropy(outputs, y, reduction="none") / (y != IGNORED)
        return vmap(lambda o, t: self.loss_function(o.unsqueeze(0), t.unsqueeze(0)))(outputs, y)

    # --- first derivatives -----------------------------------------------------------------------

    @full_float32()
    @torch.enable_grad()
    def loss_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """L(θ) and ∇L(θ) `(d,)` in one pass."""
        loss, gradient = self._loss_and_gradient(theta, self._chunks())
        return loss.item(), gradient

    def _loss_and_gradient(
        self, theta: Tensor, chunks: Iterable[tuple[float, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        def of_chunk(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            t = theta.detach().requires_grad_()
            value = self._chunk_loss(t, x, y)
            return value.detach().double(), torch.autograd.grad(value, t)[0]

        (weight, x, y), *others = chunks
        loss, gradient = of_chunk(x, y)
        if weight == 1:  # the only one, so there is nothing to sum
            return loss, gradient
        loss, gradient = weight * loss, gradient.double().mul_(weight)
        for weight, x, y in others:
            value, part = of_chunk(x, y)
            gradient.add_(part, alpha=weight)
            loss += weight * value
        return loss, gradient.to(theta.dtype)

    def gradient(self, theta: Tensor) -> Tensor:
        """∇L(θ), shape `(d,)`."""
        return self.loss_and_gradient(theta)[1]

    def batch_gradient(self) -> BatchGradient:
        """(θ, x, y) ↦ loss `()` in float64 and gradient `(d,)` on the mini-batch (x, y).

        For many steps on other samples than the landscape's: nothing is prepared anew.
        """

        @full_float32()
        @torch.enable_grad()
        def on(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            parts = zip(self._laid_out(x).split(self.chunk), y.split(self.chunk), strict=True)
            return self._loss_and_gradient(theta, ((len(a) / len(x), a, b) for a, b in parts))

        return replayed(on, self.x.device)

    def sample_gradients(self, theta: Tensor) -> Iterator[Tensor]:
        """Per-sample gradients ∇ℓᵢ(θ), as blocks of shape `(n, d)`, n bounded by memory."""

        def one(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return self._chunk_loss(t, x.unsqueeze(0), y.unsqueeze(0))

        size = min(self.chunk, max(1, GRADIENTS // self.dimension))
        by_layers = self._known_by_layers(theta)
        for x, y in zip(self.x.split(size), self.y.split(size), strict=True):
            with full_float32():
                if by_layers:
                    block = products.layered(partial(self._sample_losses, x=x, y=y), theta).rows()
                else:
                    block = vmap(grad(one), in_dims=(None, 0, 0))(theta.detach(), x, y)
            yield block

    def slopes(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample slopes ∇ℓᵢ(θ)·u, shape `(N,)`; their variance is uᵀCu."""
        return self.per_sample_along(theta, u)[2]

    @full_float32()
    def per_sample_along(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """What `per_sample` and `slopes` along u give, from one pass, `(N,)` each."""
        known = self._known_by_layers(theta)
        measure = slopes.by_layers if known else slopes.by_forward_mode
        losses, wrong, along = [], [], []
        for _, x, y in self._chunks():
            both = partial(self._losses_and_outputs, x=x, y=y)
            values, outputs, slope = measure(both, theta, u.to(theta.dtype))
            losses.append(values)
            wrong.append(_wrong(outputs, y))
            along.append(slope)
        return torch.cat(losses), _joined(wrong), torch.cat(along)

    # --- products --------------------------------------------------------------------------------

    def hessian(self, theta: Tensor) -> Matvec:
        """v ↦ H(θ)v with H = ∇²L; `(d,)` or `(d, b)`.

        By double backward a block of b vectors shares forward and first backward pass of a chunk.
        """
        return products.hessian(*self._split(theta))

    def graph_size(self, theta: Tensor) -> float:
        """Bytes per sample that a product with H keeps for the next, where memory allows."""
        part = self._split(theta)[0][0]
        return products.graph_size(part, theta) / (part.weight * self.n_samples)

    def gauss_newton(self, theta: Tensor) -> Matvec:
        """v ↦ G(θ)v with G = 1/N ∑ᵢ Jᵢᵀ ∇²ℓᵢ Jᵢ, the positive part of H (Schraudolph 2002)."""
        return products.gauss_newton(*self._split(theta))

    def covariance(self, theta: Tensor, *, centred: bool = True) -> Matvec:
        """v ↦ C(θ)v with C = 1/N ∑ᵢ (gᵢ−g)(gᵢ−g)ᵀ over per-sample gradients gᵢ with mean g.

        Per-sample slopes gᵢ·v, then their pull-back; no `(N, d)` storage. Uncentred it is the
        second moment 1/N ∑ gᵢgᵢᵀ, the "empirical Fisher".
        """
        return self.covariance_and_mean(theta)[0] if centred else self._moments(theta)[0]

    def covariance_and_mean(self, theta: Tensor) -> tuple[Matvec, Tensor]:
        """The product with C(θ), and ∇L(θ) `(d,)`, the mean g, which one pass gives with it."""
        second_moment, mean_gradient = self._moments(theta)
        gradient = mean_gradient()
        mean = gradient.double()

        def product(v: Tensor) -> Tensor:
            return (second_moment(v).double() - mean * (mean @ v.double())).to(v.dtype)

        return product, gradient

    def _moments(self, theta: Tensor) -> tuple[Matvec, Callable[[], Tensor]]:
        """Product with the second moment of the per-sample gradients, and their mean."""
        by_layers = self._known_by_layers(theta)
        return products.second_moment(*self._split(theta), by_layers=by_layers)

    def _known_by_layers(self, theta: Tensor) -> bool:
        """Whether `lsa.landscape.derivatives.sample_gradients` has them; tried on a few samples."""
        few = partial(self._sample_losses, x=self.x[:FEW], y=self.y[:FEW])
        return sample_gradients.are_exact(few, theta)

    def _split(self, theta: Tensor) -> tuple[list[products.Part], Tensor, int]:
        """The chunks as functions of θ, θ, and the bytes that their graphs may hold."""
        parts = [
            products.Part(
                weight,
                len(x),
                loss=partial(self._chunk_loss, x=x, y=y),
                losses=partial(self._sample_losses, x=x, y=y),
                outputs=partial(self.outputs, x=x),
                loss_of=partial(self._loss_of, y=y),
            )
            for weight, x, y in self._chunks()
        ]
        return parts, theta, self.graph_memory

    def _loss_of(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.loss_function(outputs, y)

    @full_float32()
    def curvatures(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample curvatures uᵀ∇²ℓᵢ(θ)u, shape `(N,)`.

        Their mean is uᵀHu; their spread gives its standard error over the data. They take about as
        long as two gradients where all parameters are those of layers that are known.
        """
        known = self._known_by_layers(theta)
        measure = curvatures.by_layers if known else curvatures.by_one_step
        parts = [
            measure(partial(self._sample_losses, x=x, y=y), theta, u, len(x))
            for _, x, y in self._chunks()
        ]
        return torch.cat(parts)

    @full_float32()
    def gauss_newton_curvatures(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample (Jᵢu)ᵀ∇²ℓᵢ(Jᵢu), shape `(N,)`: the part of the curvature that G has."""
        parts = []
        for _, x, y in self._chunks():
            with torch.no_grad():
                outputs = self.outputs(theta, x)
            moved = modes.along(partial(self.outputs, x=x), theta.detach(), u.to(theta.dtype))

            def losses(
                alpha: Tensor, o: Tensor = outputs, m: Tensor = moved, y: Tensor = y
            ) -> Tensor:
                return self._losses_of(o + alpha * m, y)

            parts.append(products.second_derivatives(losses, len(x), theta))
        return torch.cat(parts)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by its formula: the fused kernels lack second and forward derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _wrong(outputs: Tensor, y: Tensor) -> Tensor | None:
    """Whether each sample is taken for another class, `(n,)`; None for no classes."""
    classes = outputs.ndim == 2 and y.ndim == 1 and not y.is_floating_point()
    return outputs.argmax(1) != y if classes else None


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error; nan error for a single value."""
    n = len(values)
    error = (values.std() / n**0.5).item() if n > 1 else float("nan")
    return values.mean().item(), error
