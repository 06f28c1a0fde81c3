"""Squares of the gradients of single samples, from the training's own passes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lsa.landscape.network import unwrapped
from lsa.runtime.errors import InputError
from lsa.watching.hooks import OnModule
from lsa.watching.sample_uses import Part, Use, form_of, squares
from lsa.watching.undisturbed import measuring
from lsa.watching.weights import Weights

log = logging.getLogger("lsa.watch")
AGREEMENT = 1e-2  # relative: ∑ cᵢ against the gradient, in half precision too

Run = Callable[[Callable[[], None]], Any]


class SampleNoise:
    """∑ |cᵢ|² of each parameter, cᵢ the part of sample i in the gradient of one pass.

    Hooks on layers keep their inputs and the gradients at their outputs in steps that are due. The
    first time ∑ cᵢ is compared with the gradient: parameters where they differ (used outside of a
    known layer, or by all samples alike, as positions are) are left out, with one line.

    Args:
        model: As it is trained.
        weights: Of it.
    """

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self._model, self._weights = unwrapped(model), weights
        self._compiled = hasattr(model, "_orig_mod")
        self._index = {id(p): i for i, p in enumerate(weights.parameters)}
        self._calls: list[_Call] = []
        self._left: set[int] | None = None  # parameters that are left out; None: not checked yet

    def attach(self, due: Callable[[], bool]) -> list[Any]:
        """Hooks on layers; none do anything in steps that are not `due`."""

        def called(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if measuring() or not due() or not torch.is_grad_enabled():
                return
            if isinstance(output, Tensor) and output.requires_grad and len(inputs) == 1:
                self._calls.append(call := _Call(module, inputs[0]))
                output.register_hook(call.take)

        if self._compiled:
            return []  # hooks inside of a compiled network would make it another
        own = [m for m in self._model.modules() if self._has(m) and form_of(m) and _is_plain(m)]
        return [m.register_forward_hook(OnModule(called)) for m in own]

    def _has(self, module: nn.Module) -> bool:
        return any(id(p) in self._index for p in module.parameters(recurse=False))

    def squares(self, samples: int) -> Tensor:
        """`(parameters,)` in float64, nan where they are left out; forgets the pass.

        Args:
            samples: Of the pass.

        Raises:
            InputError: A network of which single samples are not known.
        """
        self._refuse()
        uses: dict[int, list[Use]] = {}
        broken: set[int] = set()
        for call in self._calls:
            for p, use in call.parts():
                if (i := self._index.get(id(p))) is not None:
                    uses.setdefault(i, []).append(use)
                    if len(use[0]) != samples:
                        broken.add(i)
        self.forget()
        if self._left is None:
            self._left = broken | self._wrong(uses)
            self._say()
        known = torch.full((len(self._index),), torch.nan, dtype=torch.float64)
        for i, of in uses.items():
            if i not in self._left | broken:
                known[i] = squares(of)
        return known

    def _refuse(self) -> None:
        """Say why single samples are not known, if they are not."""
        if self._compiled:
            raise InputError("a compiled network hides single samples; measure 'noise' on batches=")
        if any(isinstance(m, _BatchNorm) and m.training for m in self._model.modules()):
            raise InputError(
                "batch norm in training mode mixes the samples, so that none has a gradient of "
                "its own; measure 'noise' on batches="
            )

    def _wrong(self, uses: dict[int, list[Use]]) -> set[int]:
        """Parameters of which the sum over the samples is not the gradient."""
        wrong = set()
        for i, p in enumerate(self._weights.parameters):
            if p.grad is None:
                continue
            wanted = p.grad.detach().to_dense().float()
            if i not in uses:
                wrong.add(i)
                continue
            total = sum(use.total().float() for use in uses[i])
            assert isinstance(total, Tensor)
            scale = max(float(wanted.norm()), 0.01 * math.sqrt(float(squares(uses[i]))))
            if float((total.view(wanted.shape) - wanted).norm()) > AGREEMENT * scale:
                wrong.add(i)
        return wrong

    def _say(self) -> None:
        assert self._left is not None
        if len(self._left) == len(self._index):
            raise InputError(
                "no layer tells gradients of single samples; measure 'noise' on batches="
            )
        if self._left:
            sizes = [p.numel() for p in self._weights.parameters]
            names = [self._weights.names[i] for i in sorted(self._left)]
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            log.warning(
                "watch: noise_of_samples leaves out %s: %.2g of all numbers; single samples are "
                "not known there",
                shown,
                sum(sizes[i] for i in self._left) / sum(sizes),
            )

    def forget(self) -> None:
        """Let a pass go."""
        self._calls = []


def _is_plain(module: nn.Module) -> bool:
    """Whether its weights are kept, not computed: to read them may change it (spectral norm)."""
    return not any(hasattr(type(module), name) for name in ("weight", "bias"))


class _Call:
    """One call of a layer in the training's forward pass."""

    def __init__(self, module: nn.Module, a: Tensor) -> None:
        self._module, self._a, self._version = module, a.detach(), a._version
        self._delta: Tensor | None = None  # None as long as no loss is seen to depend on it

    def take(self, delta: Tensor) -> None:
        """The gradient at the outputs is there."""
        self._delta = delta.detach()

    def parts(self) -> Iterator[Part]:
        """How its parameters are used; nothing where inputs or gradient are not known."""
        form = form_of(self._module)
        if form and self._delta is not None and self._a._version == self._version:
            yield from form(self._module, self._a, self._delta)
