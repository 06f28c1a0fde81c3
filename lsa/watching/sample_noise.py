"""Squares of the gradients of single samples, from the training's own passes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from lsa.landscape.network import unwrapped
from lsa.runtime.errors import InputError
from lsa.watching.hooks import OnModule
from lsa.watching.sample_uses import Part, Use, form_of, squares
from lsa.watching.undisturbed import measuring, undisturbed
from lsa.watching.weights import Weights

log = logging.getLogger("lsa.watch")
AGREEMENT = 1e-2  # relative: ∑ cᵢ against the gradient, in half precision too

Run = Callable[[Callable[[], None]], Any]


class SampleNoise:
    """∑ |cᵢ|² of each parameter, cᵢ the part of sample i in the gradient of one pass.

    Hooks on layers keep their inputs and the gradients at their outputs in steps that are due. The
    first time ∑ cᵢ is compared with the gradient: parameters where they differ (used outside of a
    known layer, or by all samples alike, as positions are) are left out, with one line. Later they
    are compared along one direction, as a penalty on the weights may begin.

    A layer may have positions before samples. Where both are as many, two forward passes show it:
    another first sample must change the first row alone.

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
        self._given: Any = None  # arguments of the network, until it is checked
        self._seen: list[tuple[nn.Module, Tensor]] | None = None  # in a pass of the check
        self._told = False  # that the gradient is another than the sum

    def attach(self, due: Callable[[], bool]) -> list[Any]:
        """Hooks on layers; none do anything in steps that are not `due`."""

        def begins(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling():
                return
            if self._left is None and not measuring() and due() and torch.is_grad_enabled():
                self._given = args, kwargs

        def called(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if torch.compiler.is_compiling():  # where a hook would be a part of what is compiled
                return
            if self._seen is not None and len(inputs) == 1:
                self._seen.append((module, inputs[0]))
            if measuring() or not due() or not torch.is_grad_enabled():
                return
            if isinstance(output, Tensor) and output.requires_grad and len(inputs) == 1:
                self._calls.append(call := _Call(module, inputs[0]))
                output.register_hook(call.take)

        if self._compiled:
            return []  # hooks inside of a compiled network would make it another
        own = [m for m in self._model.modules() if self._has(m) and form_of(m) and _is_plain(m)]
        first = self._model.register_forward_pre_hook(OnModule(begins), with_kwargs=True)
        return [first, *(m.register_forward_hook(OnModule(called)) for m in own)]

    def _has(self, module: nn.Module) -> bool:
        return any(id(p) in self._index for p in module.parameters(recurse=False))

    def squares(self, samples: int) -> Tensor:
        """`(parameters,)` in float64, nan where they are left out; forgets the pass.

        Args:
            samples: Of the pass.

        Raises:
            InputError: No layer tells single samples, or it is not known which dimension they are.
        """
        calls, checked = self._calls, self._left is not None
        self.forget()
        turned = set() if checked else self._turned(calls, samples)
        uses: dict[int, list[Use]] = {}
        broken: set[int] = set()
        for call in calls:
            for p, use in call.parts():
                if (i := self._index.get(id(p))) is not None:
                    uses.setdefault(i, []).append(use)
                    if len(use[0]) != samples or id(call.module) in turned:
                        broken.add(i)
        known = torch.full((len(self._index),), torch.nan, dtype=torch.float64, device="cpu")
        if self._left is None:
            self._left = broken | self._wrong(uses)
            self._say(turned=bool(turned))
        for i, of in uses.items():
            if i not in self._left | broken:
                known[i] = squares(of)
        if checked and self._has_other_terms(uses, known):
            known.fill_(torch.nan)
        return known

    def _turned(self, calls: list[_Call], samples: int) -> set[int]:
        """Ids of layers that have positions before samples, or mix the samples.

        Raises:
            InputError: It is not known, as the network was not called as a whole.
        """
        given, self._given = self._given, None
        if not any(_may_be_turned(call.module, call.a, samples) for call in calls):
            return set()
        if given is None:
            raise InputError(
                f"the batch has {samples} samples and as many positions, which are told apart only "
                "where the network is called as a whole; give batches of another size"
            )
        own, other = self._inputs(given), self._inputs(_with_another_first(given, samples))
        return {
            id(module)
            for (module, a), (_, b) in zip(own, other, strict=False)
            if _may_be_turned(module, a, samples) and not _alike(a[1:], b[1:])
        }

    def _inputs(self, given: Any) -> list[tuple[nn.Module, Tensor]]:
        """Layers and their inputs in one pass of the network, which always draws the same."""
        args, kwargs = given
        self._seen = seen = []
        try:
            with undisturbed(self._model), torch.no_grad():
                torch.manual_seed(0)
                self._model(*args, **kwargs)
        finally:
            self._seen = None
        return seen

    def _has_other_terms(self, uses: dict[int, list[Use]], known: Tensor) -> bool:
        """Whether the gradient is no longer the sum over the samples; said once.

        Args:
            uses: Of parameters.
            known: Their squares, nan where they are left out.
        """
        for i, of in uses.items():
            p, length = self._weights.parameters[i], math.sqrt(float(known[i]))
            if p.grad is None or math.isnan(length):
                continue
            g = p.grad.detach().to_dense().float()
            r = torch.randn(g.shape[-1], generator=_generator(), dtype=g.dtype, device="cpu").to(
                g.device
            )
            total = sum(use.along(r).float().flatten() for use in of)
            assert isinstance(total, Tensor)
            scale = max(float(g.norm()), 0.01 * length)
            if float((total - (g @ r).flatten()).norm()) > 3 * AGREEMENT * scale:
                self._tell(self._weights.names[i])
                return True
        return False

    def _tell(self, name: str) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "watch: the gradient of %s is no longer the sum over the samples, as where a "
                "penalty on the weights begins; noise_of_samples is not measured in such steps",
                name,
            )

    def refuse(self) -> None:
        """Check that single samples may be known.

        Raises:
            InputError: The network is compiled, or batch norm mixes them.
        """
        if self._compiled or self._model._compiled_call_impl is not None:
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

    def _say(self, *, turned: bool) -> None:
        assert self._left is not None
        why = "layers have positions before samples (batch_first=False), or mix them"
        if len(self._left) == len(self._index):
            raise InputError(
                f"no layer tells gradients of single samples{f': {why}' if turned else ''}; "
                "measure 'noise' on batches="
            )
        if self._left:
            sizes = [p.numel() for p in self._weights.parameters]
            names = [self._weights.names[i] for i in sorted(self._left)]
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            log.warning(
                "watch: noise_of_samples leaves out %s: %.2g of all numbers; single samples are "
                "not known there%s",
                shown,
                sum(sizes[i] for i in self._left) / sum(sizes),
                f", as {why}" if turned else "",
            )

    def forget(self) -> None:
        """Let a pass go."""
        self._calls = []


def _generator() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(0)


def _with_another_first(given: Any, samples: int) -> Any:
    """Arguments of the network, with a sample from the middle in the place of the first."""

    def changed(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.ndim or len(t) != samples:
            return t
        return torch.cat([t[samples // 2][None], t[1:]])

    return tree_map(changed, given)


def _may_be_turned(module: nn.Module, a: Tensor, samples: int) -> bool:
    """Whether a layer's inputs have as many positions as samples."""
    if isinstance(module, nn.Embedding):
        return samples in a.shape[1:]
    first = isinstance(module, nn.GroupNorm | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not first and samples in a.shape[1:-1]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two inputs differ by rounding at most."""
    a, b = a.float(), b.float()
    return a.shape == b.shape and float((a - b).norm()) <= 1e-3 * float(a.norm())


def _is_plain(module: nn.Module) -> bool:
    """Whether its weights are kept, not computed: to read them may change it (spectral norm)."""
    return not any(hasattr(type(module), name) for name in ("weight", "bias"))


class _Call:
    """One call of a layer in the training's forward pass."""

    def __init__(self, module: nn.Module, a: Tensor) -> None:
        self.module, self.a, self._version = module, a.detach(), a._version
        self._delta: Tensor | None = None  # None as long as no loss is seen to depend on it

    def take(self, delta: Tensor) -> None:
        """The gradient at the outputs is there."""
        self._delta = delta.detach()

    def parts(self) -> Iterator[Part]:
        """How its parameters are used; nothing where inputs or gradient are not known."""
        form = form_of(self.module)
        if form and self._delta is not None and self.a._version == self._version:
            yield from form(self.module, self.a, self._delta)
