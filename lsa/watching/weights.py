"""The parameters that a training moves, with sums over them: whole, by block, and over shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lsa.landscape.network import unwrapped
from lsa.maths.sums import inner, of_step, square
from lsa.runtime.errors import InputError

Block = Callable[[str], str]


def block_of(name: str) -> str:
    """The block of a parameter: its name up to the first number, else the first part of it."""
    parts = name.split(".")[:-1] or [name]
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[: number + 1])


class Weights:
    """The parameters of a model that some optimizers move, in the model's order.

    A parameter that is sharded (FSDP, a DTensor) is seen as this process's shard, and every sum is
    made whole over the processes that hold the others.

    Args:
        model: Wrapped or not.
        optimizers: Over its parameters.
        block: Name of a parameter → name of its block.

    Raises:
        InputError: The optimizers move none of the model's parameters.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], block: Block = block_of
    ) -> None:
        self._model = unwrapped(model)
        named = dict(self._model.named_parameters())
        self._moved = _moved_by(optimizers)
        moved = {p for p, *_ in self._moved}
        chosen = {name: p for name, p in named.items() if id(p) in moved}
        if not chosen:
            raise InputError(
                f"{type(optimizers[0]).__name__} moves none of the model's {len(named)} "
                "parameters; give the model whose parameters the optimizer was made for"
            )
        self.outside = len(moved) - len(chosen)  # parameters moved that are not the model's
        self.names, self.parameters = list(chosen), list(chosen.values())
        blocks = [block(name) for name in self.names]
        self.blocks = list(dict.fromkeys(blocks))
        self._of = torch.tensor([self.blocks.index(b) for b in blocks], device="cpu")
        self._groups = _shard_groups(model, self.parameters)

    def have_changed(self, optimizers: Sequence[Optimizer], *, inside: bool = False) -> bool:
        """Whether the optimizers move other parameters now: added, frozen or thawed ones, or of
        another form.

        Args:
            optimizers: Of the training.
            inside: Whether to see as well that the model has the same ones, which may have been
                replaced under the same names; not of shards, which FSDP2 puts in and out.
        """
        if inside and not self._groups:
            now = dict(self._model.named_parameters())
            pairs = zip(self.names, self.parameters, strict=True)
            if any(now.get(name) is not p for name, p in pairs):
                return True
        return _moved_by(optimizers) != self._moved

    @property
    def sharded(self) -> bool:
        """Whether some parameter is spread over several processes."""
        return bool(self._groups)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that logs."""
        return not dist.is_initialized() or dist.get_rank() == 0

    def wait(self) -> None:
        """Wait until a GPU has done what the training has asked of it, which is not our time."""
        device = self.parameters[0].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def agreed(self, number: int) -> int:
        """A number as the first process has it, for all that hold shards."""
        if not self.sharded:
            return number
        told = torch.tensor([number], device=_local(self.parameters[0]).device)
        dist.broadcast(told, 0)
        return int(told)

    def local(self) -> list[Tensor]:
        """Every parameter as it is in this process."""
        return [_local(p.detach()) for p in self.parameters]

    def gradients(self) -> list[Tensor | None]:
        """Every gradient as it is in this process; None of a parameter without one."""
        return [None if p.grad is None else _local(p.grad) for p in self.parameters]

    def inner(
        self,
        pairs: Sequence[tuple[Sequence[Tensor | None], Sequence[Tensor | None]]],
        *,
        each: bool = True,
    ) -> Tensor:
        """Products of lists of tensors in float64, parameter by parameter: `(pairs, parameters)`.

        Where one of two tensors is None, their product is 0.

        Args:
            pairs: The lists.
            each: Whether the products of each parameter are wanted; else they may be given as
                their sums, `(pairs, 1)`, which take a few kernels of a GPU.
        """
        if not each and not self._groups and _local(self.parameters[0]).is_cuda:
            return _sums(pairs)
        zero = torch.zeros((), dtype=torch.float64, device=_local(self.parameters[0]).device)
        rows = [
            torch.stack(
                [
                    zero if x is None or y is None else _product(x, y).to(zero.device)
                    for x, y in zip(a, b, strict=True)
                ]
            )
            for a, b in pairs
        ]
        return self._whole(torch.stack(rows))

    def of_step(
        self,
        back: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        last: Sequence[Tensor] | None,
        *,
        each: bool = True,
    ) -> Tensor:
        """g·g, u·u, θ·θ, −g·u and u·v of the step that led to the weights, as `inner` gives them.

        Args:
            back: θ before the step, which becomes −u.
            gradients: g.
            last: −v, of the step before; None: u·v is nan.
            each: As for `inner`.
        """
        now = self.local()
        if {theta.device.type for theta in now} == {"cpu"}:
            before = [None] * len(now) if last is None else map(_flat, last)
            given = (None if g is None else _flat(g) for g in gradients)
            each_of = zip(map(_flat, back), map(_flat, now), given, before, strict=True)
            products = self._whole(torch.stack([of_step(*vectors) for vectors in each_of], 1))
        else:
            torch._foreach_sub_(back, now)  # pyright: ignore
            pairs = [(gradients, gradients), (back, back), (now, now), (gradients, back)]
            pairs.append((back, back if last is None else last))
            products = self.inner(pairs, each=each)
        if last is None:
            products[4] = math.nan
        return products

    def _whole(self, products: Tensor) -> Tensor:
        """Products `(pairs, parameters)` summed over the processes that hold shards."""
        for group, columns in self._groups:
            part = products[:, columns]
            dist.all_reduce(part, group=group)
            products[:, columns] = part
        return products

    def spans(self) -> dict[str, list[tuple[int, int]]]:
        """Block → where its parameters are in θ, all parameters one after the other."""
        spans: dict[str, list[tuple[int, int]]] = {block: [] for block in self.blocks}
        start = 0
        for i, p in enumerate(self.parameters):
            spans[self.blocks[int(self._of[i])]].append((start, start + p.numel()))
            start += p.numel()
        return spans

    def by_block(self, values: Tensor) -> Mapping[str, Tensor]:
        """Sums `(pairs,)` over the parameters of each block, of values `(pairs, parameters)`."""
        sums = values.new_zeros(len(values), len(self.blocks)).index_add_(
            1, self._of.to(values.device), values
        )
        return dict(zip(self.blocks, sums.unbind(1), strict=True))


def _moved_by(optimizers: Sequence[Optimizer]) -> list[tuple[Any, ...]]:
    """The ids of the parameters that optimizers move, with what `p.data = …` may change of them."""
    groups = (group for o in optimizers for group in o.param_groups)
    moved = (p for group in groups for p in group["params"] if p.requires_grad)
    return [(id(p), p.shape, p.dtype, p.device) for p in moved]


def _local(tensor: Tensor) -> Tensor:
    """A tensor's shard in this process, real and dense."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x·y of two tensors."""
    return square(_flat(x)) if x is y else inner(_flat(x), _flat(y))


def _sums(pairs: Sequence[tuple[Sequence[Tensor | None], Sequence[Tensor | None]]]) -> Tensor:
    """Products of lists of tensors, whole: `(pairs, 1)`."""
    flat: dict[tuple[int, ...], Tensor] = {}

    def joined(tensors: Sequence[Tensor | None], known: tuple[int, ...]) -> Tensor:
        key = (id(tensors), *known)
        if key not in flat:
            flat[key] = torch.cat([_flat(tensors[i]) for i in known])  # pyright: ignore
        return flat[key]

    sums = []
    for a, b in pairs:
        known = tuple(i for i, x in enumerate(a) if x is not None and b[i] is not None)
        sums.append(inner(joined(a, known), joined(b, known)) if known else None)
    zero = next(
        (f for f in sums if f is not None), torch.zeros((), dtype=torch.float64, device="cpu")
    )
    return torch.stack([torch.zeros_like(zero) if f is None else f for f in sums])[:, None]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)


def _shard_groups(
    model: nn.Module, parameters: Sequence[nn.Parameter]
) -> list[tuple[dist.ProcessGroup, list[int]]]:
    """Groups of processes over which sums must be added, each with the parameters concerned."""
    by_group: dict[int, tuple[dist.ProcessGroup, list[int]]] = {}
    for i, p in enumerate(parameters):
        mesh = getattr(p, "device_mesh", None)
        if mesh is None:
            continue
        for dimension, placement in enumerate(p.placements):  # pyright: ignore
            if placement.is_shard():
                group = mesh.get_group(dimension)
                by_group.setdefault(id(group), (group, []))[1].append(i)
    flat = next(
        (m for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"), None
    )
    if flat is not None:  # the first generation: every rank holds a piece of every parameter
        return [(flat.process_group, list(range(len(parameters))))]  # pyright: ignore
    return list(by_group.values())
