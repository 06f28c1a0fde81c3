"""A network as a function of a flat θ: which parameters are in it, and how they are put in."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lsa.landscape.copies import evaluation_flags, whole_gradients
from lsa.landscape.kernels import eager, norms_weights, plain_kernels
from lsa.runtime.errors import InputError

HALF = (torch.float16, torch.bfloat16)
Selection = str | Collection[str] | Callable[[str, nn.Parameter], bool]
"""Parameters by name, by glob, or by a predicate of name and parameter."""
DEEPSPEED = "DeepSpeedEngine"  # a class known by its name, as lsa does not import it


class Converts(InputError):
    """A network converts its own parameters while it runs."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of `torch.compile`, DataParallel, DistributedDataParallel and others.

    Raises:
        InputError: No network, a scripted one, or one with parameters that have no shape or no
            numbers yet, or that DeepSpeed's ZeRO has taken apart.
    """
    if not isinstance(model, nn.Module):
        kind = model.__name__ if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"the model is {kind}; give a network, an instance of torch.nn.Module")
    while True:
        wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        wrapped |= type(model).__name__ == DEEPSPEED
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)
        if type(model).__name__ == "_FabricModule":  # which lets no backward pass but its own
            inner = model._forward_module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("the network is scripted, so no θ can be put in; give the nn.Module")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(f"parameter {name!r} has no shape yet; run the network once on data")
        if parameter.is_meta:
            raise InputError(
                f"parameter {name!r} is on the device meta, where there are no numbers; load the "
                "weights first"
            )
        if hasattr(parameter, "ds_status"):
            raise InputError(
                f"parameter {name!r} is in parts over the processes (DeepSpeed's ZeRO, stage 3); "
                "load its checkpoint into the network without DeepSpeed, or shard by fully_shard"
            )
    return model


def _other_names(model: nn.Module, names: list[str]) -> str:
    """What trained tied parameters are called here, of those meant by the name of a second use.

    Args:
        model: The network.
        names: Names and globs that match no first name.
    """
    first = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    again = {
        name: first[id(p)]
        for name, p in model.named_parameters(remove_duplicate=False)
        if first.get(id(p), name) != name
    }
    meant = [name for glob in names for name in fnmatch.filter(again, glob)]
    return "; ".join(f"{name} is tied to {again[name]}: give that name" for name in meant)


def selected(model: nn.Module, selection: Selection | None) -> list[str]:
    """Names of the parameters that θ is made of: those that are trained, or a selection of them.

    Raises:
        InputError: Nothing is selected, a name or glob matches no parameter, or a parameter holds
            complex numbers or numbers of 8 bits.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if selection is None:
        chosen = list(named)
    elif callable(selection):
        chosen = [name for name, p in named.items() if selection(name, p)]
    else:
        patterns = [selection] if isinstance(selection, str) else list(selection)
        unmatched = [p for p in patterns if not fnmatch.filter(named, p)]
        if unmatched or not patterns:
            raise InputError(
                f"no parameter is named {', '.join(unmatched) or 'by the empty selection'}; "
                + (_other_names(model, unmatched) or f"choose from {', '.join(named)}")
            )
        chosen = [n for n in named if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if not chosen:
        raise InputError("the network has no trainable parameter; set requires_grad or parameters=")
    for name in chosen:
        if named[name].is_complex():
            raise InputError(f"parameter {name!r} is complex; store its real and imaginary parts")
        if named[name].dtype.itemsize == 1:
            raise InputError(
                f"parameter {name!r} is {named[name].dtype}, in which no step along a direction "
                "can be told; freeze it, or keep it in a wider precision"
            )
    return chosen


class Network:
    """A network whose named parameters are a function of θ, shape `(d,)`.

    Args:
        model: The network; θ is put into it and taken out again, nothing of it is changed.
        names: Of the parameters in θ, in order.
        keeps_mode: Put the training flags back after every use, for a network that is not a copy.
        wrapper: What the network is called through, `torch.compile`'s; default: itself.

    Raises:
        InputError: When it is used: the network cannot be called as a function of θ; says why.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        *,
        keeps_mode: bool = False,
        wrapper: nn.Module | None = None,
    ) -> None:
        self.model, self.names = model, names
        self._wrapper = model if wrapper is None else wrapper
        self._plain = True  # the kernels of the outermost block of `at`
        self._parameters = parameters = [model.get_parameter(name) for name in names]
        self._shapes = [p.shape for p in parameters]
        self._dtypes = [p.dtype for p in parameters]
        self._mixed = len({d for d in self._dtypes if d not in HALF}) > 1
        self.sizes = [p.numel() for p in parameters]
        position = {id(p): i for i, p in enumerate(parameters)}
        self._slots = [
            (module, name, position[id(p)], p)
            for module in model.modules()
            for name, p in module._parameters.items()
            if p is not None and id(p) in position
        ]
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._versions = [_version(buffer) for _, _, buffer, _ in self._buffers]
        self._silent: set[int] | None = None  # see `_written_silently`; None: not seen yet
        self.keeps_mode = keeps_mode
        self.keeps_others = any(
            p.requires_grad and id(p) not in position for p in model.parameters()
        )
        self._inside = False  # of a block of `at`
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
        self._normed = any(norms_weights(m) for m in model.modules())
        self._differentiates = False  # a pass takes gradients itself, by its inputs say
        self._by_parameters = False  # or by its parameters
        self._values: list[Tensor] = []  # that are in the network now
        self._parted = False  # see `parted`
        self._total: Tensor | None = None  # see `gathering`
        self._writes: bool | None = None  # into its inputs; None: not seen yet
        self.written: str | None = None  # a buffer that a pass has written to

    @property
    def values(self) -> list[Tensor]:
        """The tensors that stand for the parameters within a block of `at`, in the order of θ."""
        return self._values

    @property
    def runner(self) -> nn.Module:
        """What a forward pass calls: the network as it trains, or without its wrapper."""
        return self.model if self._plain else self._wrapper

    def __call__(self, *inputs: Any) -> Any:
        """The network's outputs; it is given copies of inputs, where it writes into them."""
        if self._writes is False:
            return self.evaluated(lambda: self.runner(*inputs))
        given = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)
        outputs = self.evaluated(lambda: self.runner(*given))
        if self._writes is None:
            self._writes = any(_version(t) for t in tree_leaves(given) if isinstance(t, Tensor))
        return outputs

    def outputs(self, theta: Tensor, x: Any) -> Any:
        """The outputs f(θ, x)."""
        with self.at(theta):
            return self(x)

    def evaluated(self, function: Callable[[], Any]) -> Any:
        """Call a function of the network, with gradients on if it differentiates by itself.

        It may do so by its inputs (a physics-informed loss) or by its parameters (an inner step of
        training).

        Raises:
            InputError: It asks for a gradient by a tensor that needs none here.
        """
        with torch.enable_grad() if self._differentiates else contextlib.nullcontext():
            before = [v.dtype for v in self._values]
            try:
                result = function()
                if self._silent is None:
                    self._silent = self._written_silently()
                self._check_precision(before)
                return result
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                if self._by_parameters:
                    raise InputError(
                        "the objective takes a gradient by parameters that are fixed here; measure "
                        "all of them together, or leave those out of the objective's gradient"
                    ) from error
        if self._differentiates:
            self._by_parameters = True
            self._put([self._leaf(v) for v in self._values])
        self._differentiates = True
        return self.evaluated(function)

    def _check_precision(self, before: list[torch.dtype]) -> None:
        """Check that a pass left the values in the precision in which they were put in.

        Raises:
            Converts: It converted one, whose gradient then is not θ's.
        """
        for name, value, dtype in zip(self.names, self._values, before, strict=False):
            if value.dtype != dtype:
                raise Converts(
                    f"the forward pass converts its own parameter {name!r} to {value.dtype}, so "
                    "its gradient is lost; give the network in that precision"
                )

    def _leaf(self, value: Tensor) -> Tensor:
        """A value that can be differentiated by, where the network does so itself."""
        if value.requires_grad or not self._by_parameters:
            return value
        return value.detach().requires_grad_()

    @torch.inference_mode(False)
    def flat(self) -> Tensor:
        """The network's present θ `(d,)`, a detached copy; half precision becomes float32."""
        parts = [p.detach().reshape(-1) for p in self._parameters]
        return torch.cat([p.float() if p.dtype in HALF else p for p in parts])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """θ `(d,)` as named views with the parameters' shapes; in their own precision, if half."""
        return {
            name: p.to(dtype if dtype in HALF or self._mixed else p.dtype)
            for (name, p), dtype in zip(self.split(theta), self._dtypes, strict=True)
        }

    def split(self, theta: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and its part of a vector `(d,)`, a view with its shape."""
        parts = theta.split(self.sizes)
        for name, part, shape in zip(self.names, parts, self._shapes, strict=True):
            yield name, part.view(shape)

    @contextmanager
    def at(self, theta: Tensor, *, plain: bool = True) -> Iterator[None]:
        """Within the block the network has θ for its parameters; its own after the outermost one.

        A block inside of another leaves its θ there: activation checkpointing runs layers again in
        the backward pass, which must be in the same outermost block. Attention and recurrent layers
        use kernels that can be differentiated twice, and nothing is compiled; where the outermost
        block is not `plain`, all is as the network trains.

        Raises:
            InputError: Inside of `torch.inference_mode()`, where gradients are silently zero.
        """
        if torch.is_inference_mode_enabled():
            raise InputError(
                "torch.inference_mode() is on, in which torch has no derivatives; leave it first, "
                "or use torch.no_grad(), which does no harm here"
            )
        if self._inside:  # the outermost block puts the parameters back
            self._restore_buffers()
            self._put(self._views(theta))
            yield
            return
        with self.evaluating(), contextlib.ExitStack() as kernels:
            if plain:
                kernels.enter_context(eager())
                kernels.enter_context(plain_kernels(self._recurrent, self._normed))
            try:
                self._inside, self._plain = True, plain
                self._put(self._views(theta))
                yield
            finally:
                self._inside, self._plain = False, True
                self._put(None)
                self._restore_buffers()

    @contextmanager
    def parted(self) -> Iterator[None]:
        """Within the block a pass has leaves of its own for parameters, no views of θ: `values`."""
        self._parted = True
        try:
            yield
        finally:
            self._parted = False

    @contextmanager
    def gathering(self, total: Tensor) -> Iterator[Callable[[Tensor], None]]:
        """Within the block: value ↦ nothing, its gradient by θ is added to the total `(d,)`.

        No other vector as long is made: parameters are leaves of their own, and parts of the total
        are their gradients. Not for parameters that are in half precision.
        """
        self._total, self._parted = total, True

        def backward(value: Tensor) -> None:
            if value.requires_grad:
                value.backward(inputs=self._values)

        try:
            yield backward
        finally:
            self._total, self._parted = None, False

    @property
    def can_gather(self) -> bool:
        """Whether `gathering` serves: all parameters are in one precision, and not in half."""
        return len(set(self._dtypes)) == 1 and self._dtypes[0] not in HALF

    def _views(self, theta: Tensor) -> list[Tensor]:
        """Tensors in place of the parameters: views of θ, or leaves that gather gradients."""
        views = list(self.unflatten(theta).values())
        if not self._parted:
            return [self._leaf(v) for v in views]
        leaves = [v.detach().requires_grad_() for v in views]
        if self._total is not None:
            for leaf, part in zip(leaves, self._total.split(self.sizes), strict=True):
                leaf.grad = part.view_as(leaf)
        return leaves

    def _put(self, values: list[Tensor] | None) -> None:
        self._values = values or []
        for module, name, index, own in self._slots:
            value = own if values is None else values[index]
            module._parameters[name] = value  # pyright: ignore[reportArgumentType]
            if self._recurrent and isinstance(module, nn.RNNBase):  # it holds them a second time
                module._flat_weights[module._flat_weights_names.index(name)] = value

    def _restore_buffers(self) -> None:
        for i, (module, name, buffer, kept) in enumerate(self._buffers):
            written = _version(buffer) != self._versions[i] or i in (self._silent or ())
            if written or module._buffers.get(name) is not buffer:
                self.written = self.written or self._name(module, name)
                if self._inside:  # perhaps of a transform, in which no older tensor may change
                    module._buffers[name] = kept.clone()
                    continue
                with torch.no_grad():
                    buffer.copy_(kept)
                module._buffers[name] = buffer
                self._versions[i] = _version(buffer)

    def _written_silently(self) -> set[int]:
        """Buffers that the first pass changed and that torch counts no change of.

        `F.batch_norm` does so with the statistics that it is given.
        """
        return {
            i
            for i, (module, name, buffer, kept) in enumerate(self._buffers)
            if module._buffers.get(name) is buffer
            and _version(buffer) == self._versions[i]
            and (buffer.ndim == 1 and buffer.layout == torch.strided)
            and buffer.is_floating_point()
            and not torch.allclose(buffer, kept, rtol=0, atol=0, equal_nan=True)
        }

    def _name(self, module: nn.Module, buffer: str) -> str:
        prefix = next(name for name, m in self.model.named_modules() if m is module)
        return f"{prefix}.{buffer}" if prefix else buffer

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for a network that is the caller's own."""
        with evaluation(self.model) if self.keeps_mode else contextlib.nullcontext():
            yield


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within the block a caller's network has the flags of evaluation; afterwards its own.

    Embeddings then have the gradients of L, as those of a copy have.
    """
    kept = [(module, module.training) for module in model.modules()]
    try:
        for module, training in evaluation_flags(model):
            module.training = training
        with whole_gradients(model):
            yield
    finally:
        for module, training in kept:
            module.training = training


def _version(buffer: Tensor) -> int:
    """Grows where something writes into a buffer; one made in inference mode is never written."""
    return 0 if buffer.is_inference() else buffer._version
