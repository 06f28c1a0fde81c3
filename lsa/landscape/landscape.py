"""The landscape L(θ) of one network, one objective and one fixed data set, and its derivatives.

θ is flat, shape `(d,)`: the trainable parameters in `named_parameters()` order. Every quantity is
that of *all* the data in evaluation mode: L does not depend on how the data is cut into passes,
sums run in float64, and neither the caller's model, nor the data, nor any random state is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from lsa.landscape import values
from lsa.landscape.batched import Batched
from lsa.landscape.derivatives import jacobians, products, sample_gradients
from lsa.landscape.derivatives.hessians import HessianProduct
from lsa.landscape.derivatives.modes import Matvec
from lsa.landscape.derivatives.parts import Part
from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.derivatives.replay import replayed
from lsa.landscape.network import HALF, Network, selected, unwrapped
from lsa.landscape.problem import Problem
from lsa.landscape.values import Evaluation
from lsa.maths.differences import Differences
from lsa.runtime.errors import InputError

BatchGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

FEW = 8  # samples on which the gradients of layers are tried
SINGLY = "slopes"  # remark of a landscape whose samples need a backward pass each
GRADIENTS = 1 << 26  # numbers that a block of per-sample gradients may hold


def flatten(model: nn.Module) -> Tensor:
    """Trainable parameters of `model` as one vector θ, a detached copy of shape `(d,)`.

    Those in half precision are given in float32, in which steps along a direction can be told.
    """
    model = unwrapped(model)
    return Network(model, selected(model, None)).flat()


class Landscape(Problem):
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
        products: How Hessian products are computed. `exact`: by double backward. `gradients`: by
            differences of two gradients, through the network as it trains (fused attention, and
            with `copy=False` what `torch.compile` made), with the activations of one gradient and
            three vectors like θ in memory; their error is measured. `auto`: exactly,
            unless that is refused or would not fit in the free memory.
        device: Where batches are moved to; default: where the network is.

    Raises:
        InputError: No samples, inputs and targets of different number, chunk below 1, an unknown
            layout, a loss that sums, a network that no θ can be put into, or batch norm without
            running statistics, whose loss depends on the chunk.
    """

    # --- values ----------------------------------------------------------------------------------

    def outputs(self, theta: Tensor, x: Any) -> Any:
        """The network's outputs f(θ, x), in the form in which it returns them.

        Args:
            theta: θ `(d,)`.
            x: Inputs `(n, …)`, or what else the network takes.
        """
        return self.network.outputs(theta, x)

    def _parts(self) -> Iterable[Part]:
        """The passes of this process; what it sums or lists of them goes through `data.total` or
        `data.gathered`, which add what other processes have."""
        return self.data.parts(self.network)

    def _gathered(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else self.data.gathered(values)

    def _total(self, matvec: Matvec) -> Matvec:
        return lambda v: self.data.total(matvec(v))

    @full_float32()
    def loss(self, theta: Tensor) -> float:
        """L(θ)."""
        with self.network.at(theta):
            return self.data.total(values.loss(self._parts(), theta)).item()

    def losses(self, theta: Tensor) -> Tensor:
        """Per-sample losses ℓᵢ(θ), shape `(N,)`; their mean is L."""
        return self.per_sample(theta)[0]

    @full_float32()
    def per_sample(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss of each sample, and whether a classifier takes it for another class, `(N,)` each.

        The second is None where the task is not classification.
        """
        with self.network.at(theta):
            losses, wrong = values.per_sample(self._parts(), theta)
        return self.data.gathered(losses), self._gathered(wrong)

    def evaluate(self, theta: Tensor) -> Evaluation:
        """Loss and share of mistakes at θ `(d,)`, with standard errors over the N samples."""
        losses, wrong = self.per_sample(theta)
        return values.evaluation(self.influences(losses), wrong)

    # --- first derivatives -----------------------------------------------------------------------

    @full_float32()
    def loss_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """L(θ) and ∇L(θ) `(d,)` in one pass."""
        plain = self.products != "gradients"
        if self._gathers(theta):
            loss, gradient = self._gathered_gradient(None, theta, 1.0, plain)
            return loss.item(), gradient.to(theta.dtype)
        with self.network.at(_leaf(theta), plain=plain):
            loss, gradient = values.loss_and_gradient(self._parts(), theta)
        return self.data.total(loss).item(), self.data.total(gradient)

    def _gathers(self, theta: Tensor) -> bool:
        """Whether gradients can be added up where they arise."""
        own = theta.dtype not in HALF and self.network.can_gather
        return isinstance(self.data, Batched) and own

    def _gathered_gradient(
        self, total: Tensor | None, theta: Tensor, sign: float, plain: bool = False
    ) -> tuple[Tensor, Tensor]:
        """L(θ), and total + sign · ∇L(θ) in the place of the total."""
        theta = theta.detach()
        with full_float32(), self.network.at(theta, plain=plain):
            return values.add_gradient(self._parts(), theta, total, sign, self.network)

    def gradient(self, theta: Tensor) -> Tensor:
        """∇L(θ), shape `(d,)`."""
        return self.loss_and_gradient(theta)[1]

    def batch_gradient(self) -> BatchGradient:
        """(θ, x, y) ↦ loss `()` in float64 and gradient `(d,)` on the mini-batch (x, y).

        For many steps on other samples than the landscape's: nothing is prepared anew.
        """
        data = self.samples

        @full_float32()
        def own(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            batch = data.other(self.passes.laid_out(self.network, x), y)
            with self.network.at(_leaf(theta)):
                return values.loss_and_gradient(batch.parts(self.network), theta)

        compute = replayed(own, self.device)

        def on(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            loss, gradient = compute(theta, x, y)
            return data.total(loss, len(x)), data.total(gradient, len(x))

        return on

    def batches_in_turn(self) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """θ ↦ loss `()` in float64 and gradient `(d,)` of each batch, again and again without end.

        Raises:
            InputError: The data are no batches.
        """
        if not isinstance(self.data, Batched):
            raise InputError("the data are tensors; batch_gradient() takes mini-batches of them")
        while True:
            for part in self.data.in_turn(self.network):
                yield partial(self._alone, part)

    @full_float32()
    def _alone(self, part: Part, theta: Tensor) -> tuple[Tensor, Tensor]:
        with self.network.at(_leaf(theta)):
            return values.loss_and_gradient([part], theta)

    def sample_gradients(self, theta: Tensor) -> Iterator[Tensor]:
        """Per-sample gradients ∇ℓᵢ(θ), as blocks of shape `(n, d)`, n bounded by memory."""
        size = max(1, GRADIENTS // self.dimension)
        by_layers = self._known_by_layers(theta)
        for part, n in self.data.blocks(self.network, size):
            with full_float32(), self.network.at(_leaf(theta)):
                given = part, theta.detach(), size
                for rows in products.sample_rows(*given, by_layers=by_layers, singly=self._singly):
                    yield self.data.gathered(rows, n)

    def slopes(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample slopes ∇ℓᵢ(θ)·u `(N,)` along u `(d,)`; their variance is uᵀCu."""
        return self.per_sample_and_slopes(theta, u)[2]

    @full_float32()
    def per_sample_and_slopes(
        self, theta: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Results of `per_sample` and of `slopes` along u `(d,)` from one pass, `(N,)` each."""
        with self.network.at(_leaf(theta)):
            losses, wrong, slopes = values.per_sample_and_slopes(
                self._parts(), theta, u, singly=self._singly
            )
        gathered = self.data.gathered
        return gathered(losses), self._gathered(wrong), gathered(slopes)

    # --- products --------------------------------------------------------------------------------

    def hessian(self, theta: Tensor, *, exact: bool = False) -> HessianProduct | Matvec:
        """v ↦ H(θ)v with H = ∇²L; `(d,)` or `(d, b)`.

        By double backward a block of b vectors shares forward and first backward pass of a chunk.
        By differences of gradients, with a remark on their error, where `products` says so.

        Args:
            theta: θ `(d,)`.
            exact: Raise what torch or lsa raises, in place of differences.
        """
        given = self._parts(), theta, self.graph_memory
        if self._gathers(theta):
            product = products.hessian_by_parts(*given, self.network)
        else:
            product = products.hessian(*given)
        product = self._bound(self._total(product), theta)
        if exact or self.products == "exact":
            return product
        return HessianProduct(
            product,
            lambda: Differences(
                self._trained,
                theta,
                name="the Hessian product",
                add=(lambda *at: self._gathered_gradient(*at)[1]) if self._gathers(theta) else None,
            ),
            "was asked for" if self.products == "gradients" else "",
            lambda line: self.remarks.update(hessian=line),
            lambda line: self.remarks.update(exact=line),
        )

    def _trained(self, theta: Tensor) -> Tensor:
        """∇L(θ) through the network as it trains, with fused kernels and `torch.compile`'s."""
        with full_float32(), self.network.at(_leaf(theta), plain=False):
            return self.data.total(values.loss_and_gradient(self._parts(), theta)[1])

    def _bound(self, matvec: Matvec, theta: Tensor) -> Matvec:
        """The product while θ is in the network: its backward pass may run layers again."""

        def product(v: Tensor) -> Tensor:
            with self.network.at(_leaf(theta)):
                return matvec(v)

        return product

    def graph_size(self, theta: Tensor) -> float:
        """Bytes per sample that a product with H at θ `(d,)` keeps for the next, if they fit."""
        part = next(iter(self._parts()))
        with self.network.at(_leaf(theta)):
            return products.graph_size(part, theta) / part.samples

    def gauss_newton(self, theta: Tensor) -> Matvec:
        """v ↦ G(θ)v with G = 1/N ∑ᵢ Jᵢᵀ ∇²ℓᵢ Jᵢ, the positive part of H (Schraudolph 2002).

        Raises:
            InputError: An objective's outputs are not what its loss is computed from; from the
                first product, where derivatives of the outputs are not the gradient's.
        """
        if isinstance(self.data, Batched):
            with self.network.at(_leaf(theta)):
                jacobians.check_outputs(next(iter(self._parts())), theta)
        product = products.gauss_newton(self._parts(), theta, self.graph_memory)
        return self._bound(self._total(product), theta)

    def covariance(self, theta: Tensor, *, centred: bool = True) -> Matvec:
        """v ↦ C(θ)v with C = 1/N ∑ᵢ (gᵢ−g)(gᵢ−g)ᵀ over per-sample gradients gᵢ with mean g.

        Per-sample slopes gᵢ·v, then their pull-back; no `(N, d)` storage. Uncentred it is the
        second moment 1/N ∑ gᵢgᵢᵀ, the "empirical Fisher" (Kunstner et al. 2019, arXiv 1905.12558).

        Args:
            theta: θ `(d,)`.
            centred: Whether the mean gradient is taken from each.
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
            singly=self._singly,
        )

        def bound_mean() -> Tensor:
            with self.network.at(_leaf(theta)):
                return self.data.total(mean())

        return self._bound(self._total(second), theta), bound_mean

    @property
    def _singly(self) -> bool:
        """Whether slopes of samples take a backward pass for each; `consistency` finds out."""
        return SINGLY in self.remarks

    def _known_by_layers(self, theta: Tensor) -> bool:
        """Whether `lsa.landscape.derivatives.sample_gradients` may know them, by a few samples."""
        with self.network.at(_leaf(theta)):
            return sample_gradients.are_exact(self.data.few(self.network, FEW).losses, theta)

    @full_float32()
    def curvatures(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample curvatures uᵀ∇²ℓᵢ(θ)u, shape `(N,)`.

        Their mean is uᵀHu; their spread gives its standard error over the data. They take about as
        long as two gradients where all parameters are those of layers that are known. Where an
        operation has no third derivative, or a wrong second one, they are differences of slopes,
        and `remarks` says so.

        Args:
            theta: θ `(d,)`.
            u: Direction `(d,)`.

        Raises:
            InputError: Nor can they be had by differences.
        """
        wrong = "exact" in self.remarks or self._singly
        ways = () if wrong else (self._known_by_layers(theta), False)
        for by_layers in dict.fromkeys(ways):
            try:
                with self.network.at(_leaf(theta)):
                    curved = values.curvatures(self._parts(), theta, u, by_layers=by_layers)
                return self.data.gathered(curved)
            except products.UNKNOWN as error:
                products.check_unknown(error)
        slopes = Differences(
            lambda t: self.slopes(t, u.to(theta.dtype)), theta, name="the curvature of each sample"
        )
        result = slopes.derivative(u).value
        lacks = "an operation of the network has no third derivative, or no second"
        why = "exact second derivatives are wrong" if wrong else lacks
        self.remarks["curvatures"] = (
            f"curvatures of samples are by differences of slopes, as {why}; two steps differed by "
            f"{slopes.error:.1e} of them"
        )
        return result

    @full_float32()
    def gauss_newton_curvatures(self, theta: Tensor, u: Tensor) -> Tensor:
        """Per-sample (Jᵢu)ᵀ∇²ℓᵢ(Jᵢu) `(N,)` along u `(d,)`, the curvature that G has."""
        with self.network.at(_leaf(theta)):
            curved = values.gauss_newton_curvatures(self._parts(), theta, u, by_graph=self._singly)
            return self.data.gathered(curved)


def _leaf(theta: Tensor) -> Tensor:
    """θ as layers that are run again in a backward pass must see it: differentiable."""
    return theta.detach().requires_grad_()
