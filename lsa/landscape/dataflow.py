"""Which layer reads what another has written, from one forward pass.

Every call of torch in the pass is seen, whatever modules it is made of. A tensor carries the
*sources* it is made of: axes of parameters that wrote it (linear maps, embeddings, parameters that
are added), norms and attentions. Whatever is not known passes the sources of its inputs on; that
may name too many, so what is read from here has to be tried.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lsa.landscape.network import HALF

Axis = tuple[str, int]  # of a parameter
_INSIDE = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
Source = tuple[str, Any]  # ("axis", Axis), ("norm" | "scores" | "weights" | "attention", number)


class View(NamedTuple):
    """A parameter, or a view of it."""

    name: str
    shape: tuple[int, ...]  # of the parameter
    transposed: bool

    def axis(self, dim: int) -> Axis:
        """The parameter's axis that is this view's."""
        return self.name, 1 - dim % 2 if self.transposed else dim


@dataclass
class Normed:
    """One call of a norm."""

    weight: str
    bias: str | None
    sources: frozenset[Source]
    readers: list[Axis] = field(default_factory=list)
    alone: bool = True  # whether linear maps read it, and nothing else


@dataclass
class Attended:
    """One call of attention: its tensors, `(batch, heads, T, m)` each, and who reads it."""

    query: Tensor
    key: Tensor
    value: Tensor
    result: Tensor
    readers: list[tuple[Axis, Tensor]] = field(default_factory=list)  # and what it is given


class Dataflow(TorchFunctionMode):
    """Within the block, records how the network's parameters are joined.

    Args:
        model: The network, for parameters that are not in θ.
        theta: θ `(d,)`, of which the network's parameters are views.
        shapes: Name → shape of each parameter in θ, in order.
    """

    def __init__(self, model: nn.Module, theta: Tensor, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.fixed = {id(p): (n, tuple(p.shape)) for n, p in model.named_parameters()}
        self.inside, self.storage = list(shapes.items()), theta.untyped_storage().data_ptr()
        self.shapes = {**dict(self.fixed.values()), **shapes}
        self.starts, at = [], theta.storage_offset()
        for shape in shapes.values():
            self.starts.append(at)
            at += _size(shape)
        self.kept: list[Any] = []  # so that no identity is used twice
        self.of: dict[int, frozenset[Source]] = {}
        self.joined: list[tuple[Axis, Axis]] = []
        self.made: dict[Axis, Tensor] = {}  # by a linear map, on this axis
        self.biases: dict[Axis, str] = {}
        self.norms: list[Normed] = []
        self.attentions: list[Attended] = []
        self.scores: list[tuple[Tensor, Tensor]] = []
        self.single_precision = False  # whether a part of the network computes in less than float64
        self.uses: Counter[str] = Counter()
        self.reads: dict[Axis, int] = defaultdict(int)

    # --- what is seen -------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """The operation itself, noted."""
        if func is F.multi_head_attention_forward:  # in Python: its parts are looked at
            with self:
                return _INSIDE(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        leaves = [t for t in tree_leaves([args, kwargs]) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if outputs and name != "get":
            sources = self.seen(name, list(args), kwargs or {}, leaves, outputs[0])
            for t in outputs:
                self.of[id(t)] = self.of.get(id(t), frozenset()) | sources
                self.single_precision |= t.dtype in (torch.float32, *HALF) and bool(sources)
            self.kept += [leaves, outputs]
        return result

    def seen(
        self, name: str, args: list[Any], named: dict[str, Any], leaves: list[Tensor], y: Tensor
    ) -> frozenset[Source]:
        """The sources of the result of one operation.

        Args:
            name: Of the operation.
            args: Its positional arguments.
            named: Its keyword arguments.
            leaves: All tensors among them.
            y: The result, a tensor of any shape.
        """
        sources = frozenset(s for t in leaves for s in self.of.get(id(t), ()))
        views = [v for t in leaves if (v := self.view(t))]
        if name == "linear":
            x, weight, bias = _taken(args, named, "input", "weight", "bias")
            if w := self.view(weight):
                return self._linear(x, w.axis(1), w.axis(0), bias, y)
        if name == "addmm":
            bias, x, weight = _taken(args, named, "input", "mat1", "mat2")
            if w := self.view(weight):
                return self._linear(x, w.axis(0), w.axis(1), bias, y)
        if name in ("matmul", "mm", "bmm"):
            x, other = _taken(args, named, "input", "mat2" if name != "matmul" else "other")
            if (w := self.view(other)) and len(w.shape) == 2:
                return self._linear(x, w.axis(0), w.axis(1), None, y)
            if not views:
                return self._product(x, other, y)
        if name == "embedding" and len(views) == 1:
            return self._written(views[0])
        if name in ("conv1d", "conv2d") and not sources:
            _, weight, bias = _taken(args, named, "input", "weight", "bias")
            if w := self.view(weight):
                return self._linear(None, None, (w.name, 0), bias, y)
        if name in ("layer_norm", "rms_norm"):
            keys = "input", "normalized_shape", "weight", "bias"
            _, _, gain, shift = _taken(args, named, *keys)
            shift = shift if name == "layer_norm" else None  # the other's fourth is a number
            return self._norm(sources, gain, shift) if self.view(gain) else sources
        if name == "scaled_dot_product_attention":
            q, k, v = _taken(args, named, "query", "key", "value")
            return self._attention(q, k, v, y)
        if name == "softmax":
            scores = {s for s in sources if s[0] == "scores"}
            return frozenset({("weights", scores.pop()[1])}) if len(scores) == 1 else sources
        if name in ("add", "radd", "iadd", "add_", "sub", "isub") and len(views) == 1:
            return self._added(views[0], sources)
        if name in ("mul", "rmul", "imul") and len(views) == 1 and sources:
            (view,) = views
            if len(view.shape) == 1 and view.shape[0] > 1:
                return self._norm(sources, next(t for t in leaves if self.view(t)), None)
        self.uses.update(v.name for v in views if sources)
        return sources

    # --- what it means ------------------------------------------------------------------------

    def _linear(
        self, x: Tensor | None, into: Axis | None, out: Axis, bias: Any, y: Tensor
    ) -> frozenset[Source]:
        self.uses[out[0]] += 1
        self.made[out] = y
        if isinstance(bias, Tensor) and (b := self.view(bias)):
            self.uses[b.name] += 1
            self.joined.append((out, (b.name, 0)))
            self.biases[out] = b.name
        if x is not None and into is not None:
            self.reads[into] += 1
            self._read(self.of.get(id(x), frozenset()), into, x)
        return frozenset({("axis", out)})

    def _read(self, sources: frozenset[Source], axis: Axis, x: Tensor | None) -> None:
        """A parameter's axis meets what these sources have written."""
        for kind, source in sources:
            if kind == "axis":
                self.joined.append((axis, source))
            elif kind == "norm":
                norm = self.norms[source]
                self.joined.append((axis, (norm.weight, 0)))
                norm.readers.append(axis)
                norm.alone &= len(sources) == 1 and x is not None
            elif kind == "attention":
                attention = self.attentions[source]
                if x is not None and len(sources) == 1:
                    attention.readers.append((axis, x))

    def _written(self, view: View) -> frozenset[Source]:
        """An embedding, or a parameter that is added to nothing yet."""
        self.uses[view.name] += 1
        return frozenset({("axis", (view.name, len(view.shape) - 1))})

    def _added(self, view: View, sources: frozenset[Source]) -> frozenset[Source]:
        own = self._written(view)
        if not sources:
            return own
        ((_, axis),) = own
        self._read(sources, axis, None)
        return sources

    def _norm(self, sources: frozenset[Source], gain: Any, shift: Any) -> frozenset[Source]:
        view, bias = self.view(gain), self.view(shift)
        assert view
        self.uses[view.name] += 1
        if bias:
            self.uses[bias.name] += 1
            self.joined.append(((view.name, 0), (bias.name, 0)))
        self._read(sources, (view.name, 0), None)
        self.norms.append(Normed(view.name, bias.name if bias else None, sources))
        return frozenset({("norm", len(self.norms) - 1)})

    def _product(self, a: Tensor, b: Tensor, y: Tensor) -> frozenset[Source]:
        """Scores of queries and keys, or weights with values, where attention is written out."""
        weights = {s for s in self.of.get(id(a), ()) if s[0] == "weights"}
        if len(weights) == 1:
            query, key = self.scores[weights.pop()[1]]
            return self._attention(query, key, b, y)
        if a.ndim == b.ndim == 4 and self.of.get(id(a)) and self.of.get(id(b)):
            key = b.mT
            self.of[id(key)] = self.of[id(b)]
            self.scores.append((a, key))
            return frozenset({("scores", len(self.scores) - 1)})
        return self.of.get(id(a), frozenset()) | self.of.get(id(b), frozenset())

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> frozenset[Source]:
        self.attentions.append(Attended(q, k, v, y))
        return frozenset({("attention", len(self.attentions) - 1)})

    # --- parameters ---------------------------------------------------------------------------

    def view(self, t: Any) -> View | None:
        """The parameter that a tensor is, or of which it is a view; or None."""
        if not isinstance(t, Tensor):
            return None
        if id(t) in self.fixed:
            name, shape = self.fixed[id(t)]
            return View(name, shape, transposed=False)
        if t.layout != torch.strided or t.untyped_storage().data_ptr() != self.storage:
            return None
        i = bisect_right(self.starts, t.storage_offset()) - 1
        name, shape = self.inside[i]
        turned = len(shape) == 2 == t.ndim and tuple(t.shape) == shape[::-1] and t.stride(0) == 1
        return View(name, shape, transposed=turned and t.stride() != (shape[1], 1))

    def single(self, t: Tensor) -> Axis | None:
        """The axis that alone has written a tensor of any shape, norms between; or None."""
        sources = self.of.get(id(t), frozenset())
        while len(sources) == 1:
            ((kind, source),) = sources
            if kind == "axis":
                return source
            sources = self.norms[source].sources if kind == "norm" else frozenset()
        return None


def classes(pairs: Iterable[tuple[Axis, Axis]]) -> Iterator[list[Axis]]:
    """Axes that are joined to each other, in the order in which they came."""
    of: dict[Axis, list[Axis]] = {}
    for a, b in pairs:
        x, y = of.setdefault(a, [a]), of.setdefault(b, [b])
        if x is not y:
            x += y
            of.update(dict.fromkeys(y, x))
    seen = set[int]()
    for members in of.values():
        if id(members) not in seen:
            seen.add(id(members))
            yield members


def _taken(args: list[Any], named: dict[str, Any], *keys: str) -> list[Any]:
    """Arguments of a function by their names, given by position or by name; None: not given."""
    return [args[i] if i < len(args) else named.get(key) for i, key in enumerate(keys)]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
