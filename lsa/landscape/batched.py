"""A data set as batches and an objective: the parts of a pass, streamed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lsa.landscape.batches import Batch, Batches, Count, cloned, original
from lsa.landscape.derivatives import batch_norm
from lsa.landscape.derivatives.parts import Part
from lsa.landscape.network import Network
from lsa.landscape.objectives import drawn
from lsa.landscape.terms import (
    Objective,
    Terms,
    check_sum,
    checked,
    unit_sums,
    unit_weights,
    with_penalty,
)
from lsa.landscape.values import misclassified
from lsa.landscape.weighing import leaves, reach_outside
from lsa.runtime.errors import InputError


class Batched:
    """Batches and what the loss of each is made of.

    N is the number of units: samples, or batches where samples interact. A first pass without
    gradients counts units and weights; it is made when they are needed, at the network's own θ.

    Args:
        batches: The data.
        objective: `(model, batch) → Terms`.
        draws: Fixed draws of the network's random numbers to average over; 0: none are made.

    Raises:
        InputError: From the first pass: terms that do not fit together, weights that depend on θ
            or on chance, or a loss that reaches parameters outside θ.
    """

    def __init__(self, batches: Batches, objective: Objective, draws: int = 0) -> None:
        self.batches, self._objective, self.draws = batches, objective, draws
        self._counted: _Counted | None = None
        self._writes: list[bool] = []  # whether the network writes into its inputs, once seen

    # --- what there is ---------------------------------------------------------------------------

    def count(self, network: Network) -> _Counted:
        """Units and weights of all batches, from one pass; later passes must be like it.

        Raises:
            InputError: Terms that do not fit together, or no weight at all.
        """
        if self._counted is None:
            with torch.no_grad():
                theta = network.flat().to(self.batches.device)
                self._counted = self._count(network, theta)
        return self._counted

    def _count(self, network: Network, theta: Tensor) -> _Counted:
        counts, weights, separate, finite = [], [], set(), []
        for batch in self.batches:
            if not counts:
                self._check_reach(network, theta, batch)
            with network.at(theta):
                terms = self._terms(network, batch)
            check_sum(terms)
            separate.add(terms.samples is not None)
            if len(separate) > 1:
                raise InputError(
                    "the objective gives samples for some batches and not for others; give them "
                    "for all or for none"
                )
            w = unit_weights(terms)
            if not len(w):
                raise InputError(f"batch {batch.index} has no samples; leave it out")
            finite.append(bool(terms.total.isfinite()))
            weights.extend(w.tolist())  # small tensors between large ones would scatter memory
            counts.append(Count(len(w), float(w.sum()), batch.mark))
        # That of a sample is named by the probes.
        if separate == {False} and any(finite) and not all(finite):
            raise InputError(
                f"the loss of batch {finite.index(False)} is not finite, as a mean over no labels "
                "is not; mend it or leave it out"
            )
        all_weights = torch.tensor(weights, dtype=torch.float64)
        total = float(all_weights.sum())
        if not total > 0:
            raise InputError(f"the weights of all batches sum to {total:g}; some must count")
        if not self.batches.counts:
            self.batches.counts = counts
        return _Counted(all_weights, separate == {True})

    def _check_reach(self, network: Network, theta: Tensor, batch: Batch) -> None:
        """Check that the objective depends on no trainable tensor outside θ."""
        if network.keeps_others:
            return
        outside = []
        for _ in range(2):  # θ is put in for each: it is a leaf of its own where one is needed
            with torch.enable_grad(), network.at(theta):
                outside.append(leaves(with_penalty(self._terms(network, batch))))
        first, second = outside
        if reach_outside(first, second):
            raise InputError(
                "the objective depends on trainable tensors outside θ, whose part of the gradient "
                "would be left out; compute everything with the model that it is given"
            )

    def n(self, network: Network) -> int:
        """Number N of units."""
        return len(self.chosen_weights(network))

    def chosen_weights(self, network: Network) -> Tensor:
        """Weights `(N,)` of the units that are meant."""
        counted, chosen = self.count(network), self.batches.chosen
        return counted.weights if chosen is None else counted.weights[chosen]

    # --- parts -----------------------------------------------------------------------------------

    def parts(self, network: Network) -> Parts:
        """The batches as functions of θ, read anew at every iteration."""
        return Parts(self, network)

    def part(self, network: Network, batch: Batch, n: int, total: float, leaves_out: bool) -> Part:
        """One batch as functions of θ.

        Args:
            network: The network, whose parameters are θ.
            batch: The batch.
            n: Number N of units in the whole data set.
            total: Weight W of all units.
            leaves_out: Whether some unit has weight 0. Then the share of mistakes is not known.

        Raises:
            InputError: From the functions: the batch has another weight than when it was counted,
                or the objective gives no outputs for a Gauss–Newton part.
        """
        expected = self.batches.counts[batch.index]
        units = expected.units if batch.rows is None else len(batch.rows)
        scale = n / total

        def terms(theta: Tensor) -> tuple[Terms, Tensor, Tensor]:
            """Terms, and sums and weights `(units,)`, checked against those of the first pass."""
            with network.at(theta):
                made = self._terms(network, batch)
            sums, weights = unit_sums(made), unit_weights(made)
            if len(weights) != expected.units or not _close(weights.sum(), expected.weight):
                raise InputError(
                    f"batch {batch.index} weighs {float(weights.sum()):.6g}, before it was "
                    f"{expected.weight:.6g}; weights must not depend on θ or on chance"
                )
            if batch.rows is not None:
                sums, weights = sums[batch.rows], weights[batch.rows]
            return made, sums, weights

        def pure(made: Terms, sums: Tensor) -> Tensor:
            return made.total if batch.rows is None else sums.sum()

        def penalised(made: Terms, value: Tensor, weight: Tensor | float) -> Tensor:
            return value if made.penalty is None else value + weight * made.penalty

        def loss(theta: Tensor) -> Tensor:
            made, sums, weights = terms(theta)
            weight = weights.sum().to(made.total)
            return penalised(made, pure(made, sums), weight)

        def losses(theta: Tensor) -> Tensor:
            return both(theta)[0]

        def both(theta: Tensor) -> tuple[Tensor, Any]:
            made, sums, weights = terms(theta)
            return penalised(made, sums * scale, weights.to(sums) * scale), made.outputs

        def traced(theta: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            made, sums, _ = terms(theta)
            outputs = [t for t in tree_leaves(made.outputs) if isinstance(t, Tensor)]
            outputs = [t for t in outputs if t.requires_grad]
            if not outputs:
                raise InputError(
                    "the objective gives no outputs, so there is no Gauss–Newton part; set "
                    "Terms.outputs to the tensors that the loss is computed from"
                )
            return pure(made, sums), sums * scale, outputs

        def wrong(outputs: Any) -> Tensor | None:
            y = _labels(batch.content)
            flags = None if y is None or leaves_out else misclassified(outputs, y)
            return flags if flags is None or batch.rows is None else flags[batch.rows]

        return Part(1 / total, units / n, units, loss, losses, both, traced, wrong)

    def _terms(self, network: Network, batch: Batch) -> Terms:
        return self.terms(network, batch.content, batch.index)

    def terms(self, network: Network, content: Any, index: int = 0) -> Terms:
        """The objective's terms of a batch, at the θ that the network holds now.

        Args:
            network: The network.
            content: The batch, on the network's device.
            index: Number of the batch, which seeds its random draws.
        """
        if self._writes != [False]:
            content = cloned(content)
        given = original(content)

        def evaluate() -> Terms:
            if self.draws:
                return drawn(self._objective, network.runner, given, index, self.draws)
            return self._objective(network.runner, given)

        made = network.evaluated(evaluate)
        if not self._writes:
            leaves = [t for t in tree_leaves(content) if isinstance(t, Tensor)]
            self._writes.append(any(t._version for t in leaves))
        return checked(made)

    def in_turn(self, network: Network) -> Iterator[Part]:
        """Each batch, as the mean over it; those that weigh nothing are passed over."""
        weights, start = self.chosen_weights(network), 0
        for part in self.parts(network):
            weight = float(weights[start : start + part.samples].sum())
            start += part.samples
            if weight:
                yield replace(part, weight=1 / weight)

    # --- other data ------------------------------------------------------------------------------

    def subset(self, indices: Tensor, network: Network) -> Batched:
        """The data of some units only.

        A batch is computed in full if it contains one of them.

        Args:
            indices: Numbers `(n,)` of the units.
            network: That counts the units of each batch, where it is not done.
        """
        self.count(network)
        other = copy.copy(self)
        other.batches = self.batches.subset(indices)
        return other

    def with_batches(self, source: Any) -> Batched:
        """Other batches for the same objective."""
        return Batched(Batches(source, self.batches.device), self._objective, self.draws)

    def few(self, network: Network, n: int) -> Part:
        """The first batch, whatever its number of samples."""
        return next(iter(self.parts(network)))

    def blocks(self, network: Network, size: int) -> Iterator[tuple[Part, int]]:
        """Each batch and its number of samples."""
        return ((part, part.samples) for part in self.parts(network))

    def total(self, value: Tensor, n: int | None = None) -> Tensor:
        """The sum over all batches of a tensor of any shape: unchanged, for one process has all."""
        return value

    def gathered(self, values: Tensor, n: int | None = None) -> Tensor:
        """Values of all units `(N, …)`: unchanged, for one process has all."""
        return values

    def recalibrate(self, network: Network) -> None:
        """Estimate the network's batch-norm statistics anew from all batches."""
        with torch.no_grad(), batch_norm.cumulating(network.model):
            for batch in self.batches:
                self._objective(network.model, original(cloned(batch.content)))

    def double(self) -> Batched:
        """The same batches in float64."""
        other = copy.copy(self)
        other.batches = self.batches.double()
        return other


class _Counted:
    """Weights `(units,)` of the whole data set, and whether units are samples."""

    def __init__(self, weights: Tensor, samples: bool) -> None:
        self.weights, self.samples = weights.double(), samples


class Parts:
    """The batches of a data set as functions of θ; read anew at every iteration."""

    def __init__(self, data: Batched, network: Network) -> None:
        self._data, self._network = data, network

    def __iter__(self) -> Iterator[Part]:
        weights = self._data.chosen_weights(self._network)
        n, total, some_empty = len(weights), float(weights.sum()), bool((weights == 0).any())
        for batch in self._data.batches:
            yield self._data.part(self._network, batch, n, total, some_empty)


def _close(a: Tensor, b: float) -> bool:
    return abs(float(a) - b) <= 1e-5 * max(1.0, abs(b))


def _labels(content: Any) -> Tensor | None:
    """The targets of a batch of inputs and class labels; None of another batch."""
    if isinstance(content, dict):
        return content.get("labels")
    return content[1] if isinstance(content, tuple | list) and len(content) == 2 else None
