"""A problem: a network, an objective and data, and how they are computed.

What L(θ) and its derivatives are taken of; `lsa.landscape.landscape` takes them.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy as shallow
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsa.landscape import batches, objectives, shared
from lsa.landscape.batched import Batched
from lsa.landscape.copies import check_lengths, duplicate, prepared
from lsa.landscape.derivatives import batch_norm, budget, hessians
from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.network import Network, Selection, selected, unwrapped
from lsa.landscape.passes import Passes
from lsa.landscape.samples import Samples
from lsa.landscape.terms import Objective
from lsa.landscape.weighing import Loss
from lsa.runtime.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11 on

CUT = 32  # samples of a batch, where inputs that are no tensor are cut into batches


class Problem:
    """A network with some parameters in θ, and a data set with an objective.

    Its arguments are those of `Landscape`.

    Raises:
        InputError: Network, data, loss or an option from which no landscape can be made; says why.
    """

    @torch.inference_mode(False)  # in which no tensor has derivatives
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
        products: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        fixed = budget.settings()
        self.passes = Passes(
            fixed.chunk if chunk is None else chunk, fixed.layout if layout is None else layout
        )
        self.memory = fixed.memory if memory is None else memory
        self.products, wrapper = hessians.checked(products), model
        model = unwrapped(model)
        batch_norm.check_statistics(model)
        x, y = (torch.from_numpy(t) if isinstance(t, np.ndarray) else t for t in (x, y))
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor) and not (objective or draws)
        where = x.device if tensors else torch.device(device or next(model.parameters()).device)
        names = selected(model, parameters)
        self._own = dict(model.named_parameters())
        shared.check_distinct(model)
        views = shared.views_of_parameters(model)
        if copy:
            model = prepared(model).to(where)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)
        else:
            check_lengths(model)
        self.views = {attribute: shared.kept(model, attribute) for attribute in views}
        compiled = not copy and getattr(wrapper, "_orig_mod", None) is model
        self.network = Network(
            model, names, keeps_mode=not copy, wrapper=wrapper if compiled else None
        )
        with self.network.evaluating():
            batch_norm.check_mode(model)
        self.loss_function = loss
        self.remarks: dict[str, str] = {}  # what was computed otherwise than exactly
        self.data = self._placed(x, y) if tensors else self._streamed(x, y, objective, draws, where)

    def _placed(self, x: Tensor, y: Tensor) -> Samples:
        """Tensors as they shall lie, in passes of their size.

        Raises:
            InputError: They are sparse, nested or one number, so that no samples can be taken.
        """
        for name, t in (("inputs", x), ("targets", y)):
            if t.layout != torch.strided or t.is_nested:
                kind = "nested" if t.is_nested else "sparse"
                raise InputError(
                    f"{name} are a {kind} tensor, from which samples cannot be taken; give "
                    "batches: Landscape(model, [(inputs, targets), …])"
                )
            if not t.ndim:
                raise InputError(f"{name} are one number; give a tensor (N, …), N samples")
        x, y = (t.clone() if t.is_inference() else t for t in (x, y))
        x = self.passes.laid_out(self.network, x)
        return Samples(x, y, self.loss_function, self.passes.size(self.network, x))

    def _streamed(
        self, x: Any, y: Any, objective: Objective | None, draws: int, device: torch.device
    ) -> Batched:
        """Batches, or inputs and targets cut into batches."""
        source = x if y is None else batches.cut(x, y, self.passes.chunk or CUT)
        objective = objective or objectives.supervised(self.loss_function)
        return Batched(batches.Batches(source, device), objective, draws)

    # --- what it is made of ----------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The network, with the parameters that it was given with."""
        return self.network.model

    @property
    def theta(self) -> Tensor:
        """The θ `(d,)` that the network was given with, on the device of the data."""
        return self.network.flat().to(self.device)

    @property
    def x(self) -> Tensor:
        """Inputs `(N, …)`; raises as `samples` does."""
        return self.samples.x

    @property
    def y(self) -> Tensor:
        """Targets `(N, …)`; raises as `samples` does."""
        return self.samples.y

    @property
    def samples(self) -> Samples:
        """The data as tensors.

        Raises:
            InputError: The data are batches.
        """
        if isinstance(self.data, Samples):
            return self.data
        raise InputError("this needs inputs and targets as tensors; give Landscape(model, x, y)")

    @property
    def device(self) -> torch.device:
        """The device on which the data are computed."""
        data = self.data
        return data.device if isinstance(data, Samples) else data.batches.device

    @property
    def chunk(self) -> int:
        """Samples per pass; 0 for batches, which are passes as they are."""
        return self.data.chunk if isinstance(self.data, Samples) else 0

    @property
    def layout(self) -> str:
        """Memory layout of images; "" where none have been given."""
        return self.passes.layout or ""

    @property
    def graph_memory(self) -> int:
        """Bytes that the graphs of products may hold now."""
        if self.memory is not None:
            return self.memory
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
        """Influence of each unit on a mean of per-sample values `(N,)`, to first order.

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

    def changed(self, **changes: Any) -> Self:
        """A copy with other attributes."""
        other = shallow(self)
        vars(other).update(changes)
        return other

    def with_data(self, x: Any, y: Any = None) -> Self:
        """The same network and loss on other samples, or the same objective on other batches."""
        if not isinstance(self.data, Samples):
            return self.changed(data=self.data.with_batches(x))
        x = self.passes.laid_out(self.network, x)
        return self.changed(data=self.data.anew(x, y, self.passes.size(self.network, x)))

    def with_data_of(self, other: Problem) -> Self:
        """The same network on the data and loss of another landscape."""
        return self.changed(data=other.data)

    def subset(self, indices: Tensor) -> Self:
        """The same network and loss on some of the units, by their indices `(n,)`."""
        if isinstance(self.data, Samples):
            return self.changed(data=self.data.subset(indices))
        return self.changed(data=self.data.subset(indices, self.network))

    def with_model(self, model: nn.Module) -> Self:
        """The same data and loss with a copy of another model of the same architecture."""
        model = prepared(unwrapped(model)).to(self.device)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        kept = [name for name in self.network.names if name in names]
        return self.changed(network=Network(model, kept))

    def in_chunks(self, chunk: int) -> Self:
        """The same landscape in passes of so many samples; batches are passes as they are."""
        if not isinstance(self.data, Samples):
            return self
        passes = replace(self.passes, chunk=chunk)
        return self.changed(data=self.data.in_chunks(chunk), passes=passes)

    def with_memory(self, memory: int) -> Self:
        """The same landscape whose graphs may hold so many bytes."""
        return self.changed(memory=memory)

    def _duplicate(self) -> nn.Module:
        """A copy of the network; prepared, if the network is the caller's own."""
        return prepared(self.model) if self.network.keeps_mode else duplicate(self.model)

    def _at(self, theta: Tensor, names: Collection[str] | None = None) -> Network:
        """A copy of the network with θ for its parameters; θ of the new one are those named."""
        model = self._duplicate()
        chosen = self.network.names if names is None else names
        with torch.no_grad():
            for name, value in self.unflatten(theta).items():
                model.get_parameter(name).copy_(value).requires_grad_(name in chosen)
        return Network(model, [n for n in self.network.names if n in chosen])

    def restricted(self, theta: Tensor, names: Collection[str]) -> Self:
        """L as a function of the named parameters alone, the others fixed at θ.

        Its Hessian is a diagonal block of H. A product costs less, for no backward pass goes deeper
        than the named parameters. The θ of the result is their part `(b,)` of θ.

        Args:
            theta: θ `(d,)`, at which the other parameters are fixed.
            names: Of the parameters.

        Raises:
            InputError: No names, or a name that is no trainable parameter's.
        """
        unknown = sorted(set(names) - set(self.network.names))
        if unknown or not names:
            raise InputError(
                f"no parameter is named {', '.join(unknown) or 'by the empty selection'}; "
                f"choose from {', '.join(self.network.names)}"
            )
        return self.changed(network=self._at(theta, names))

    def double(self, theta: Tensor | None = None) -> Self:
        """The same landscape in float64, for differences that float32 would lose; θ in float64.

        Args:
            theta: θ `(d,)` in float64. The copy's parameters are views of it and take no memory of
                their own; default: they are those of the network.
        """
        model = self._duplicate()
        if theta is not None:
            for name, part in self.network.split(theta):
                model.get_parameter(name).data = part
        network = Network(model.double(), self.network.names)
        return self.changed(network=network, data=self.data.double())

    @full_float32()
    def recalibrated(self, theta: Tensor) -> Self:
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
        return self.changed(network=Network(network.model, network.names))

    def on_batch_statistics(self) -> Self:
        """This landscape with batch norm on the statistics of the samples in hand, one chunk.

        Where the data are batches, each keeps its own statistics.

        For mini-batches: the gradient then contains how the statistics depend on θ. Returns self
        when there is no batch norm.
        """
        if not batch_norm.layers(self.model):
            return self
        model = self._duplicate()
        batch_norm.use_batches(model)
        network = Network(model, self.network.names)
        if isinstance(self.data, Batched):
            return self.changed(network=network)
        data = self.samples
        passes = replace(self.passes, chunk=data.n)
        return self.changed(network=network, data=data.in_one_pass(), passes=passes)
