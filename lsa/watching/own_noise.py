"""Noise of the gradient from the training's own: where a step adds up several gradients.

Accumulation adds those of k passes, DistributedDataParallel averages those of K processes. Of the
kK gradients a of b samples each, whose mean ḡ is what the optimizer is given,

    E|a|² = |G|² + tr C/b,    E|ḡ|² = |G|² + tr C/(kKb),

so one step gives both unknowns without bias (McCandlish et al. 2018, arXiv 1812.06162, App. A.1).
One step says little: the scale is the quotient of means over many. In a step of one pass the B
samples of its batch are kK = B gradients of b = 1 (`lsa.watching.sample_noise`).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from lsa.landscape.noise_scale import diversity
from lsa.maths.ratios import quotient
from lsa.maths.sums import square
from lsa.runtime.errors import InputError
from lsa.watching.draws import Draws
from lsa.watching.hooks import OnModule, take_off, uncompiled, weakly
from lsa.watching.sample_noise import SampleNoise
from lsa.watching.undisturbed import measuring
from lsa.watching.weights import Weights

WINDOW = 50  # measured steps over which the scale is averaged
LEAST = 8  # of them
MEANS = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")  # torch's, by processes
SAMPLES = "noise_of_samples"  # the kind of measurement


class OwnNoise:
    """Squares of the gradients that one step adds up, as this process computes them.

    Hooks before autograd adds a gradient to `.grad` see that of one pass, and of one process. In a
    step of one gradient, the parts of single samples are those that it adds up, where asked for.

    Args:
        model: As it is trained.
        weights: Of it.
        blocks: Whether the noise of each block is wanted.
    """

    def __init__(self, model: nn.Module, weights: Weights, *, blocks: bool = False) -> None:
        self._model, self._weights, self.blocks = model, weights, blocks
        self._processes, self._shared = 1, None
        self._see_wrapper(_outside(model))
        self._due: Callable[[], bool] = lambda: False
        self._run: Callable[[str, Callable[[], None]], Any] = lambda _, work: work()
        self._leaves: list[tuple[int, nn.Parameter]] = []
        self._hooks: list[Any] = []  # on them, in steps that are due
        self._pass: tuple[int, bool] = (-1, False)  # of autograd; whether it adds to `.grad`
        self._squares: list[list[Tensor]] = [[] for _ in weights.parameters]
        self._marks: list[tuple[int, int]] = []  # of the gradients at the end of the last pass
        self._passing = False  # a pass has given its first gradient
        self._mixed = False  # something else has written into gradients that are kept
        self._ended = 0  # passes of the step at hand
        self.dropped = 0  # those of them whose gradients the training has thrown away
        self._sizes: list[int | None] = []  # samples of each call of the network
        self._told: list[int | None] = []  # samples of each pass, as the trainer tells them
        self._seen: dict[str, deque[tuple[float, float]]] = {}  # by block; "" is the whole
        self._samples: SampleNoise | None = None
        self._draws = Draws()
        self._each: Tensor | None = None  # squares of single samples, by parameter

    @property
    def passes(self) -> int:
        """Backward passes whose gradients the step uses; 0 where they were not counted."""
        return self._ended - self.dropped

    @property
    def known(self) -> bool:
        """Whether steps have given numbers."""
        return bool(self._seen)

    def attach(
        self,
        due: Callable[[], bool],
        calls: Callable[[], bool],
        run: Callable[[str, Callable[[], None]], Any],
        sampling: Callable[[], bool] | None,
    ) -> list[Any]:
        """Hooks; none do anything in steps that are not `due`.

        Args:
            due: Whether the step at hand is measured.
            calls: The same, asked when the network is called.
            run: Does the work of a part.
            sampling: Whether single samples are; None: never.
        """
        if self._weights.sharded:
            return []

        def begins(_module: Any, args: Any, kwargs: Any) -> None:
            if not torch.compiler.is_compiling() and torch.is_grad_enabled() and not measuring():
                if calls():
                    # Trainers show a model that another wraps, in whose pass this one is.
                    self._see_wrapper(DistributedDataParallel._active_ddp_module)
                    self._sizes.append(_samples((args, kwargs)))

        self._due, self._run = due, run
        handles: list[Any] = [
            self._model.register_forward_pre_hook(OnModule(begins), with_kwargs=True)
        ]
        self._leaves = [
            (i, p)
            for i, p in enumerate(self._weights.parameters)
            if p.is_leaf and p.requires_grad and not p.is_complex()
        ]
        if sampling is not None:
            self._samples = SampleNoise(self._model, self._weights)
            handles += self._samples.attach(sampling)
        return handles

    def _see_wrapper(self, model: Any) -> None:
        """See how many processes average the gradients of a network that may be wrapped."""
        if isinstance(model, DistributedDataParallel):
            self._processes = torch.distributed.get_world_size(model.process_group)
            self._shared = model

    def listen(self, on: bool) -> None:
        """Put hooks where gradients are added up, or take them off."""
        if on == bool(self._hooks):
            return
        take_off(self._hooks, [p for _, p in self._leaves])
        self._hooks = [p.register_hook(self._hook(i, p)) for i, p in self._leaves] if on else []

    def _hook(self, i: int, p: nn.Parameter) -> Callable[..., None]:
        """A hook on a parameter, whose node in the graph is not kept: it would keep its shape."""
        see, known = weakly(self._see), weakref.ref(p)
        return uncompiled(lambda g: see(i, known(), g))

    def _see(self, i: int, p: nn.Parameter | None, g: Tensor) -> None:
        """A parameter's gradient of one pass."""
        if p is not None and self._due() and self._adds_up(p):
            if not self._passing:
                self._run("norms", self._see_whether_kept)
            if self._processes > 1 or self._ended > self.dropped:
                self._run("norms", lambda: self._squares[i].append(_square(g)))

    def _adds_up(self, p: nn.Parameter) -> bool:
        """Whether the pass at hand adds to `.grad`; that of `torch.autograd.grad` does not."""
        number = torch._C._current_graph_task_id()
        if number != self._pass[0]:
            self._pass = number, _is_added(p)
        return self._pass[1]

    def _see_whether_kept(self) -> None:
        """Forget the passes before, where a pass begins and they have been thrown away.

        A step that a training leaves out, as a GradScaler does, has passes that no step adds up.
        The squares of a first pass are taken when a second one begins: most steps have only one.
        """
        self._passing = True  # gradients may lie in one memory, and all are written into by one
        parameters = self._weights.parameters
        if not self._marks:
            return
        if self._marks == [_mark(p) for p in parameters]:
            if not self.several():
                for i, _ in self._leaves:
                    if (g := parameters[i].grad) is not None:
                        self._squares[i] = [_square(g)]
            return
        self._mixed = any(p.grad is not None and bool(p.grad.to_dense().any()) for p in parameters)
        self._squares, self.dropped = [[] for _ in self._squares], self._ended

    def passed(self) -> None:
        """A backward pass has ended."""
        self._marks = [_mark(p) for p in self._weights.parameters]
        self._passing = False
        self._ended += 1

    def tell(self, batch: Any) -> None:
        """The batch of a pass, where calls of the network do not say when one begins."""
        self._told.append(_samples(batch))

    @property
    def _passed(self) -> list[int | None]:
        """Samples of each pass, so far."""
        return (self._told or self._sizes)[self.dropped :]

    def several(self) -> bool:
        """Whether this step has several gradients, so far."""
        return self._processes > 1 or self._passes() > 1

    def _passes(self) -> int:
        return max(min(1, self._ended - self.dropped), *map(len, self._squares))

    def take_samples(self) -> None:
        """Take the squares of single samples at the end of a pass, if it is the step's first."""
        if self._samples is None or self.several():
            return
        self._samples.refuse()
        if not (self._sizes or self._told):
            raise InputError(
                "no call of the network is seen, as where it is compiled inside of another, or its "
                "parts are called; measure 'noise' on batches="
            )
        if self._passed and self._passed[0]:
            self._each = self._samples.squares(self._passed[0])

    def numbers(self, total: Tensor | None, scale: float | Tensor) -> Mapping[str, float]:
        """Noise of the step at hand, and over those measured; nothing where it is not known.

        Args:
            total: |ḡ|² before clipping, of a loss that is scaled, `(parameters,)`; or their sum,
                `(1,)`, where neither blocks nor samples are asked for.
            scale: Of the loss, `(parameters,)` where it differs.

        Raises:
            InputError: A hook of DistributedDataParallel gives another gradient than the mean.
        """
        passes, squares, sizes = self._passes(), self._squares, self._passed
        n, sampled = passes * self._processes, self._each
        # One forward pass for each backward pass, all of equally many samples: else gradients of
        # different losses, or of unequal weights, are added up.
        known = total is not None and passes == len(sizes) and len({*sizes}) == 1 and sizes[0]
        try:
            if not known or self._mixed or total is None or not total.isfinite().all():
                return {}
            total, b = total.cpu() / scale**2, int(sizes[0] or 0)
            if n > 1:
                _refuse_other_means(self._shared)
                passed = [[float(s) for s in of] for of in squares]
                whole = [of for of in passed if len(of) == passes]  # with a gradient in every pass
                if not self._draws.alike([sum(of) for of in zip(*whole, strict=True)]):
                    return {}
                sums = [sum(of) for of in passed]
                each = torch.tensor(sums, dtype=torch.float64, device="cpu") * passes / scale**2
                each = each if len(total) > 1 else each.sum()[None]
            elif sampled is not None and b > 1:
                each = sampled * b / scale**2
                n, b = b, 1
            else:
                return {}
        finally:
            self.forget()
        return self._taken(*estimates(each, total, n, b), n * b)

    def _taken(self, signal: Tensor, trace: Tensor, samples: int) -> Mapping[str, float]:
        """Numbers of the whole and of blocks, from those of parameters, nan where not known."""
        told = (signal + trace).isfinite()
        values = torch.stack([trace, signal]).where(told, 0.0)
        known: dict[str, float] = {}
        blocks = self._weights.by_block(values) if self.blocks and len(told) > 1 else {}
        for block, (t, s) in {"": values.sum(1), **blocks}.items():
            if not (t or s):  # nothing of it is known
                continue
            seen = self._seen.setdefault(block, deque(maxlen=WINDOW))
            seen.append((float(t), float(s)))
            numbers = {"noise_trace": float(t), "gradient_squared": float(s)}
            numbers |= averaged(seen, samples)
            known |= {f"{name}/{block}" if block else name: v for name, v in numbers.items()}
        return known

    def forget(self) -> None:
        """Let the gradients of a step go."""
        self._squares, self._each = [[] for _ in self._squares], None
        self._sizes, self._told, self._marks = [], [], []
        self._ended = self.dropped = 0
        self._passing = self._mixed = False
        if self._samples is not None:
            self._samples.forget()


def _outside(model: Any) -> Any:
    """The outermost wrapper inside of `torch.compile`'s and Fabric's."""
    for name in ("_orig_mod", "_forward_module") * 2:
        model = getattr(model, name, model)
    return model


def _refuse_other_means(model: DistributedDataParallel | None) -> None:
    """Check that the processes' gradients are averaged, by torch's plain hooks if by any.

    Raises:
        InputError: They are compressed, or averaged over some of the processes.
    """
    for hook, _ in () if model is None else model._comm_hooks:
        if getattr(hook, "__name__", None) not in MEANS:
            raise InputError(
                f"{getattr(hook, '__name__', hook)} puts the processes' gradients together, which "
                "may be another one than their mean and then tells no noise; measure 'noise' on "
                "batches="
            )


def _is_added(p: nn.Parameter) -> bool:
    """Whether autograd is about to add to a parameter's `.grad`."""
    try:
        node = torch.autograd.graph.get_gradient_edge(p).node
        return torch._C._will_engine_execute_node(node)  # pyright: ignore[reportAttributeAccessIssue]
    except RuntimeError:  # torch's way to say that the gradient is returned
        return False


def _square(g: Tensor) -> Tensor:
    return square(g.detach().to_dense().reshape(-1))


def _mark(p: nn.Parameter) -> tuple[int, int]:
    """What tells whether something else than a backward pass has written into its gradient."""
    return (0, 0) if p.grad is None else (id(p.grad), p.grad._version)


Values = TypeVar("Values", float, Tensor)


def estimates(each: Values, total: Values, n: int, b: int) -> tuple[Values, Values]:
    """|G|² and tr C, unbiased.

    Args:
        each: Mean of |a|² over some of n gradients.
        total: |ḡ|² of the mean of all n.
        n: 2 or more.
        b: Samples of each.
    """
    return (n * total - each) / (n - 1), b * n * (each - total) / (n - 1)


def _samples(batch: Any) -> int | None:
    """Samples of a batch: they are along the first dimension of its first tensor."""
    first = next((t for t in tree_leaves(batch) if isinstance(t, Tensor)), None)
    return len(first) if first is not None and first.ndim else None


def averaged(seen: deque[tuple[float, float]], samples: int) -> Mapping[str, float]:
    """The scale tr C/|G|² of means over steps and the diversity, with their 95 % intervals.

    As long as the noise may hide the gradient, only the ends that are known.

    Args:
        seen: (tr C, |G|²) of each step.
        samples: Of a whole batch.
    """
    if len(seen) < LEAST:
        return {}
    trace, signal = torch.tensor(list(seen), dtype=torch.float64, device="cpu").T
    scale = quotient(trace, signal)
    return scale.named("noise_scale") | diversity(scale, samples).named("gradient_diversity")
