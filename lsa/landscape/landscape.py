"""The landscape L(θ) of one network, one objective and one fixed data set, and its derivatives.

θ is flat, shape `(d,)`: the trainable parameters in `named_parameters()` order. Every quantity is
that of *all* the data in evaluation mode: L does not depend on how the data is cut into passes,
sums run in float64, and neither the caller's model, nor the data, nor any random state is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from copy import copy as shallow
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsa.landscape import batches, objectives, values
from lsa.landscape.batched import Batched
from lsa.landscape.derivatives import batch_norm, budget, products, sample_gradients
from lsa.landscape.derivatives.differences import Differences
from lsa.landscape.derivatives.modes import Matvec
from lsa.landscape.derivatives.parts import Part
from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.derivatives.replay import replayed
from lsa.landscape.network import Network, Selection, prepared, selected, unwrapped
from lsa.landscape.samples import Samples
from lsa.landscape.terms import Objective
from lsa.landscape.values import Evaluation
from lsa.landscape.weighing import Loss
from lsa.runtime.errors import InputError

BatchGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

FEW = 8  # samples on which the size of a pass is measured
CUT = 32  # samples of a batch, where inputs that are no tensor are cut into batches
GRADIENTS = 1 << 26  # numbers that a block of per-sample gradients may hold


def flatten(model: nn.Module) -> Tensor:
    """Trainable parameters of `model` as one vector θ, a detached copy of shape `(d,)`.

    Those in half precision are given in float32, in which steps along a direction can be told.
    """
    model = unwrapped(model)
    return Network(model, selected(model, None)).flat()


class Landscape:
    """L(θ), a mean over a data set, with gradient, curvature and gradient-noise products.

    `Landscape(model, x, y, loss)` takes tensors or NumPy arrays. `Landscape(model, batches,
    objective=…)` takes any re-iterable of batches and an objective, one of `lsa.objectives` or of
    one's own; without one, batches are pairs (inputs, targets) for `loss`.

    Args:
        model: Network f. It is copied, and evaluated in `eval()` mode: dropout off, batch norm on
            its running statistics, so that L is one fixed function of θ.
        x: Inputs, shape `(N, …)`, on the device where the work shall happen; or batches.
        y: Targets, shape `(N, …)`; None where `x` is batches.
        loss: ℓ, `(outputs, targets) -> scalar`: one of torch's cross entropies, which may weigh or
            ignore targets, or any mean over samples.
        objective: `(model, batch) → lsa.Terms`, in place of `loss`.
        chunk: Samples per pass; bounds memory, changes the result by rounding. Default that of
            `lsa.configure`, else what a CPU's cache holds, or what fills a GPU within an eighth of
            its free memory. Batches are passes as they are.
        memory: Bytes that graphs may hold from one product to the next, which then costs up to a
            third less; changes the result by rounding. Default that of `lsa.configure`, else half
            of the free memory, less for a process that does not use all cores; 0 for batches.
        layout: How images lie in memory, `channels_last` or `contiguous`; changes the result by
            rounding. Default that of `lsa.configure`, else `channels_last`, the faster one on every
            machine tried, where the network can take it.
        parameters: Those that θ is made of, by name, glob or predicate `(name, parameter) → bool`;
            default: all that are trained.
        draws: Number of fixed draws over which a network that is random even in evaluation mode is
            averaged (a variational autoencoder, dropout that stays on); 0: it is not random.
        copy: Whether to work on a copy of the network. Without one the caller's network has θ
            put in during a computation, and its own parameters, buffers and mode again after it.
        device: Where batches are moved to; default: where the network is.

    Raises:
        InputError: No samples, inputs and targets of different number, chunk below 1, an unknown
            layout, a loss that sums, a network that no θ can be put into, or batch norm without
            running statistics, whose loss depends on the chunk.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        y: Any = None,
        loss: Loss = F.cross_entropy,
        *,
        objective: Objective | None = None,
        chunk: int | None = None,
        memory: int | None = None,
        layout: str | None = None,
        parameters: Selection | None = None,
        draws: int = 0,
        copy: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk={chunk} holds no sample; choose chunk ≥ 1")
        if layout is not None and layout not in budget.LAYOUTS:
            raise InputError(f"layout={layout!r}; choose {' or '.join(budget.LAYOUTS)}")
        model = unwrapped(model)
        batch_norm.check_statistics(model)
        x, y = (torch.from_numpy(t) if isinstance(t, np.ndarray) else t for t in (x, y))
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor) and not (objective or draws)
        where = x.device if tensors else torch.device(device or next(model.parameters()).device)
        names = selected(model, parameters)
        self._own = dict(model.named_parameters())
        if copy:
            model = prepared(model).to(where).eval()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)
        self.network = Network(model, names, keeps_mode=not copy)
        self.loss_function = loss
        fixed = budget.settings()
        self._chunk = fixed.chunk if chunk is None else chunk
        self._memory = fixed.memory if memory is None else memory
        self.layout = layout or fixed.layout or ""
        self._saved: dict[object, float] = {}  # by a sample's shape: bytes that its pass saves
        self.remarks: dict[str, str] = {}  # what was computed otherwise than exactly
        self.data = self._placed(x, y) if tensors else self._streamed(x, y, objective, draws, where)

    def _placed(self, x: Tensor, y: Tensor) -> Samples:
        """Tensors as they shall lie, in passes of their size."""
        self.layout = self.layout or self._possible_layout(x)
        x = self._laid_out(x)
        return Samples(x, y, self.loss_function, self._chunk or self._pass_size(x))

    def _streamed(
        self, x: Any, y: Any, objective: Objective | None, draws: int, device: torch.device
    ) -> Batched:
        """Batches, or inputs and targets cut into batches."""
        source = x if y is None else batches.cut(x, y, self._chunk or CUT)
        objective = objective or objectives.supervised(self.loss_function)
        return Batched(batches.Batches(source, device), objective, draws)

    def _possible_layout(self, x: Tensor) -> str:
        """Channels last, unless the network takes views that only contiguous images have."""
        first, second = budget.LAYOUTS
        layout = budget.image_layout(self.model, x, first)
        if layout is not None:
            try:
                with torch.no_grad():
                    self.outputs(self.network.flat().to(x.device), budget.laid_out(x[:2], layout))
            except RuntimeError as error:
                if "view size is not compatible" in str(error):
                    return second
        return first

    def _laid_out(self, x: Tensor) -> Tensor:
        return budget.laid_out(x, budget.image_layout(self.model, x, self.layout))

    def _pass_size(self, x: Tensor) -> int:
        if x.device.type != "cuda":
            return budget.cache_size(self.model, x)
        key = (x.shape[1:], x.dtype)
        if key not in self._saved:
            few = x[:FEW]
            size = products.saved(lambda theta: self.outputs(theta, few), self.network.flat())
            self._saved[key] = size / len(few)
        return budget.card_size(self._saved[key], x.device)

    # --- what it is made of ----------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The network, at the parameters that it came with."""
        return self.network.model

    @property
    def theta(self) -> Tensor:
        """θ of the network as it came, `(d,)`, on the device of the data."""
        return self.network.flat().to(self.device)

    @property
    def x(self) -> Tensor:
        """Inputs `(N, …)`.

        Raises:
            InputError: The data are batches.
        """
        return self._samples().x

    @property
    def y(self) -> Tensor:
        """Targets `(N, …)`; raises as `x` does."""
        return self._samples().y

    def _samples(self) -> Samples:
        if isinstance(self.data, Samples):
            return self.data
        raise InputError("this needs inputs and targets as tensors; give Landscape(model, x, y)")

    @property
    def device(self) -> torch.device:
        """Where the data are computed."""
        data = self.data
        return data.device if isinstance(data, Samples) else data.batches.device

    @property
    def chunk(self) -> int:
        """Samples per pass; 0 for batches, which are passes as they are."""
        return self.data.chunk if isinstance(self.data, Samples) else 0

    @property
    def graph_memory(self) -> int:
        """Bytes that the graphs of products may hold now."""
        if self._memory is not None:
            return self._memory
        return budget.graph_memory(self.device) if isinstance(self.data, Samples) else 0

    @property
    def dimension(self) -> int:
        """Number d of parameters in θ."""
        return sum(self.network.sizes)

    @property
    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters that θ is made of, in its order, as the caller's model holds them."""
        return [self._own[name] for name in self.network.names]

    @property
    def n_samples(self) -> int:
        """Number N of units: samples, or batches where samples interact."""
        return self.data.n if isinstance(self.data, Samples) else self.data.n(self.network)

    @property
    def has_samples(self) -> bool:
        """Whether units are samples, and not batches of samples that interact."""
        return isinstance(self.data, Samples) or self.data.count(self.network).samples

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """θ `(d,)` as named views with the parameters' shapes."""
        return self.network.unflatten(theta)

    def influences(self, values: Tensor) -> Tensor:
        """What each unit adds to a mean of per-sample values `(N,)`, to first order.

        A mean with weights is a ratio: its influences are N/W (sᵢ − m wᵢ) for the values N sᵢ/W
        with mean m. They are given with m added, so that their mean is the number itself.
        """
        ratios = self._ratios()
        if ratios is None:
            return values
        mean = values.double().mean(0)
        ratios = ratios.to(mean).reshape(-1, *[1] * (values.ndim - 1))
        return values.double() - mean * (ratios - 1)

    def _ratios(self) -> Tensor | None:
        """Weights over their mean, `(N,)`; None where all are alike."""
        if isinstance(self.data, Samples):
            return self.data.ratios
        weights = self.data.chosen_weights(self.network)
        alike = bool((weights == weights[0]).all())
        return None if alike else weights * (len(weights) / weights.sum())

    # --- other landscapes of the same network ----------------------------------------------------

    def _changed(self, **changes: Any) -> Landscape:
        other = shallow(self)
        vars(other).update(changes)
        return other

    def with_data(self, x: Any, y: Any = None) -> Landscape:
        """The same network and loss on other samples, or the same objective on other batches."""
        if isinstance(self.data, Samples):
            return self._changed(data=self._placed(x, y))
        return self._changed(data=self.data.with_batches(x))

    def with_data_of(self, other: Landscape) -> Landscape:
        """The same network on the data and loss of another landscape."""
        return self._changed(data=other.data)

    def subset(self, indices: Tensor) -> Landscape:
        """The same network and loss on some of the units."""
        if isinstance(self.data, Samples):
            return self._changed(data=self.data.subset(indices))
        return self._changed(data=self.data.subset(indices, self.network))

    def with_model(self, model: nn.Module) -> Landscape:
        """The same data and loss with a copy of another model of the same architecture."""
        model = prepared(unwrapped(model)).to(self.device).eval()
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        kept = [name for name in self.network.names if name in names]
        return self._changed(network=Network(model, kept))

    def in_chunks(self, chunk: int) -> Landscape:
        """The same landscape in passes of so many samples; batches are passes as they are."""
        if not isinstance(self.data, Samples):
            return self
        return self._changed(data=self.data.in_chunks(chunk), _chunk=chunk)

    def with_memory(self, memory: int) -> Landscape:
        """The same landscape whose graphs may hold so many bytes."""
        return self._changed(_memory=memory)

    def _at(self, theta: Tensor, names: Collection[str] | None = None) -> Network:
        """A copy of the network with θ for its parameters; θ of the new one are those named."""
        model = deepcopy(self.model)
        chosen = self.network.names if names is None else names
        with torch.no_grad():
            for name, value in self.unflatten(theta).items():
                model.get_parameter(name).copy_(value).requires_grad_(name in chosen)
        return Network(model.eval(), [n for n in self.network.names if n in chosen])

    def restricted(self, theta: Tensor, names: Collection[str]) -> Landscape:
        """L as a function of the named parameters alone, the others fixed at θ.

        Its Hessian is a diagonal block of H, and costs less: no backward pass goes deeper than the
        named parameters do. Where it starts, `restricted.theta` is their part of θ.

        Raises:
            InputError: No names, or a name that is no trainable parameter's.
        """
        unknown = sorted(set(names) - set(self.network.names))
        if unknown or not names:
            raise InputError(
                f"no parameter is named {', '.join(unknown) or 'at all'}; "
                f"choose from {', '.join(self.network.names)}"
            )
        return self._changed(network=self._at(theta, names))

    def double(self) -> Landscape:
        """The same landscape in float64, for differences that float32 would lose; θ in float64."""
        model = deepcopy(self.model).double()
        return self._changed(network=Network(model, self.network.names), data=self.data.double())

    @full_float32()
    def recalibrated(self, theta: Tensor) -> Landscape:
        """This landscape with batch-norm statistics re-estimated at θ on its own data.

        Needed at every interpolated θ (Jordan et al. 2023, arXiv 2211.08403). Returns self when
        the model tracks no statistics.
        """
        if not batch_norm.tracks_statistics(self.model):
            return self
        network = self._at(theta)
        if isinstance(self.data, Samples):
            batch_norm.recalibrate(network.model, self.data.x)
        else:
            self.data.recalibrate(network)
        return self._changed(network=Network(network.model, network.names))

    def on_batch_statistics(self) -> Landscape:
        """This landscape with batch norm on the statistics of the samples in hand, one chunk.

        For mini-batches: the gradient then contains how the statistics depend on θ. Returns self
        when there is no batch norm.
        """
        if not batch_norm.layers(self.model):
            return self
        data = self._samples()
        model = deepcopy(self.model)
        batch_norm.use_batches(model)
        network = Network(model, self.network.names)
        return self._changed(network=network, data=data.in_chunks(data.n), _chunk=data.n)

    # --- values ----------------------------------------------------------------------------------

    def outputs(self, theta: Tensor, x: Any) -> Any:
        """Network outputs f(θ, x)."""
        with self.network.at(theta):
            return self.network(x)

    def _parts(self) -> Iterable[Part]:
        return self.data.parts(self.network)

    @full_float32()
    def loss(self, theta: Tensor) -> float:
        """L(θ)."""
        with self.network.at(theta):
            return values.loss(self._parts(), theta)

    def losses(self, theta: Tensor) -> Tensor:
        """Per-sample losses ℓᵢ(θ), shape `(N,)`; their mean is L."""
        return self.per_sample(theta)[0]

    @full_float32()
    def per_sample(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss of each sample, and whether a classifier takes it for another class, `(N,)` each.

        The second is None where the task is not classification.
        """
        with self.network.at(theta):
            return values.per_sample(self._parts(), theta)

    def evaluate(self, theta: Tensor) -> Evaluation:
        """Loss and error with standard errors over the N samples."""
        losses, wrong = self.per_sample(theta)
        return values.evaluation(self.influences(losses), wrong)

    # --- first derivatives -----------------------------------------------------------------------

    @full_float32()
    def loss_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """L(θ) and ∇L(θ) `(d,)` in one pass."""
        with self.network.at(_leaf(theta)):
            loss, gradient = values.loss_and_gradient(self._parts(), theta)
        return loss.item(), gradient

    def gradient(self, theta: Tensor) -> Tensor:
        """∇L(θ), shape `(d,)`."""
        return self.loss_and_gradient(theta)[1]

    def batch_gradient(self) -> BatchGradient:
        """(θ, x, y) ↦ loss `()` in float64 and gradient `(d,)` on the mini-batch (x, y).

        For many steps on other samples than the landscape's: nothing is prepared anew.
        """
        data = self._samples()

        @full_float32()
        def on(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            batch = data.other(self._laid_out(x), y)
            with self.network.at(_leaf(theta)):
                return values.loss_and_gradient(batch.parts(self.network), theta)

        return replayed(on, self.device)

    def sample_gradients(self, theta: Tensor) -> Iterator[Tensor]:
        """Per-sample gradients ∇ℓᵢ(θ), as blocks of shape `(n, d)`, n bounded by memory."""
        size = max(1, GRADIENTS // self.dimension)
        by_layers = self._known_by_layers(theta)
        for part in self.data.blocks(self.network, size):
            with full_float32(), self.network.at(_leaf(theta)):
                blocks = products.sample_rows(part, theta.detach(), size, by_layers=by_layers)
                yield from blocks

    def slopes(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample slopes ∇ℓᵢ(θ)·u, shape `(N,)`; their variance is uᵀCu."""
        return self.per_sample_along(theta, u)[2]

    @full_float32()
    def per_sample_along(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """What `per_sample` and `slopes` along u give, from one pass, `(N,)` each."""
        by_layers = self._known_by_layers(theta)
        with self.network.at(_leaf(theta)):
            return values.per_sample_along(self._parts(), theta, u, by_layers=by_layers)

    # --- products --------------------------------------------------------------------------------

    def hessian(self, theta: Tensor, *, exact: bool = False) -> Matvec:
        """v ↦ H(θ)v with H = ∇²L; `(d,)` or `(d, b)`.

        By double backward a block of b vectors shares forward and first backward pass of a chunk.
        Where an operation has no second derivative, by differences of gradients, with a remark.

        Args:
            theta: θ `(d,)`.
            exact: Raise what torch or lsa raises, in place of differences.
        """
        product = products.hessian(self._parts(), theta, self.graph_memory)
        if not exact:
            product = products.or_else(product, lambda why: self._by_differences(theta, why))
        return self._bound(product, theta)

    def _by_differences(self, theta: Tensor, why: str) -> Matvec:
        """Hessian products by differences of gradients, and a remark on their error."""
        differences = Differences(self.gradient, theta, name="the Hessian product")

        def product(v: Tensor) -> Tensor:
            columns = [differences.along(column) for column in v.reshape(len(v), -1).unbind(1)]
            self.remarks["hessian"] = (
                f"Hessian products are by differences of gradients, as {why}; two steps differed "
                f"by at most {differences.error:.1e} of a product"
            )
            return torch.stack(columns, 1).reshape(v.shape)

        return product

    def _bound(self, matvec: Matvec, theta: Tensor) -> Matvec:
        """The product while θ is in the network: its backward pass may run layers again."""

        def product(v: Tensor) -> Tensor:
            with self.network.at(_leaf(theta)):
                return matvec(v)

        return product

    def graph_size(self, theta: Tensor) -> float:
        """Bytes per sample that a product with H keeps for the next, where memory allows."""
        part = next(iter(self._parts()))
        with self.network.at(_leaf(theta)):
            return products.graph_size(part, theta) / part.samples

    def gauss_newton(self, theta: Tensor) -> Matvec:
        """v ↦ G(θ)v with G = 1/N ∑ᵢ Jᵢᵀ ∇²ℓᵢ Jᵢ, the positive part of H (Schraudolph 2002)."""
        return self._bound(products.gauss_newton(self._parts(), theta, self.graph_memory), theta)

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
        second, mean = products.second_moment(
            self._parts(),
            theta,
            self.graph_memory,
            samples=self.n_samples,
            by_layers=self._known_by_layers(theta),
        )

        def bound_mean() -> Tensor:
            with self.network.at(_leaf(theta)):
                return mean()

        return self._bound(second, theta), bound_mean

    def _known_by_layers(self, theta: Tensor) -> bool:
        """Whether `lsa.landscape.derivatives.sample_gradients` has them; tried on a few samples."""
        with self.network.at(_leaf(theta)):
            return sample_gradients.are_exact(self.data.few(self.network, FEW).losses, theta)

    @full_float32()
    def curvatures(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample curvatures uᵀ∇²ℓᵢ(θ)u, shape `(N,)`.

        Their mean is uᵀHu; their spread gives its standard error over the data. They take about as
        long as two gradients where all parameters are those of layers that are known.
        """
        for by_layers in dict.fromkeys((self._known_by_layers(theta), False)):
            try:
                with self.network.at(_leaf(theta)):
                    return values.curvatures(self._parts(), theta, u, by_layers=by_layers)
            except products.UNKNOWN as error:
                products.check_unknown(error)
        slopes = Differences(
            lambda t: self.slopes(t, u.to(theta.dtype)), theta, name="the curvature of each sample"
        )
        return slopes.along(u)

    @full_float32()
    def gauss_newton_curvatures(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample (Jᵢu)ᵀ∇²ℓᵢ(Jᵢu), shape `(N,)`: the part of the curvature that G has."""
        with self.network.at(_leaf(theta)):
            return values.gauss_newton_curvatures(self._parts(), theta, u)


def _leaf(theta: Tensor) -> Tensor:
    """θ as layers that are run again in a backward pass must see it: differentiable."""
    return theta.detach().requires_grad_()
