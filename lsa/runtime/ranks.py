"""The processes that `torchrun` started on one computation, called ranks.

All run the same deterministic probe. What they sum together comes back with the same bits on every
rank, so that all take the same decisions; the first alone logs and prints. Torch is imported only
where ranks meet: the command line asks who it is without.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lsa.runtime.errors import InputError, first_line

if TYPE_CHECKING:
    from torch import Tensor

# Longest that a rank waits for another which is alive: the first may queue for its step's claim.
PATIENCE = timedelta(hours=12)
STORE_ANSWERS = timedelta(seconds=10)
_met: Any = None  # the store through which the ranks have met


def size() -> int:
    """Number of ranks; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Number of this process among the ranks, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def on_machine() -> int:
    """Number of ranks on this machine; 1 without `torchrun`."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if size() > 1 else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Meet the other ranks; within the block, landscapes share their samples out to all."""
    global _met
    if size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # device=cpu needs gloo
    with _lost_told():
        _met, at, of = next(rendezvous("env://"))
        dist.init_process_group(backend, store=_met, rank=at, world_size=of, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def meeting() -> bool:
    """Whether this process computes together with others now."""
    if size() == 1:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def share(n: int) -> slice:
    """The slice of n items that this rank computes: contiguous, in parts as equal as possible."""
    return slice(rank() * n // size(), (rank() + 1) * n // size())


def total(values: Tensor) -> Tensor:
    """The sum over all ranks, in place.

    Raises:
        InputError: Another rank is gone.
    """
    import torch.distributed as dist

    with _lost_told():
        dist.all_reduce(values)
    return values


def agreed(value: str) -> str:
    """The first rank's value on every rank, where each might have looked up another."""
    if not meeting():
        return value
    import torch.distributed as dist

    values = [value]
    with _lost_told():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def device(name: str) -> str:
    """The rank's own GPU, where `cuda` is meant.

    Raises:
        InputError: There are fewer GPUs than ranks here, or one GPU is named for all.
    """
    if size() == 1 or not name.startswith("cuda"):
        return name
    import torch

    own, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if name != "cuda":
        raise InputError(f"device={name} is one GPU and each rank takes its own; give cuda")
    if own >= gpus:
        raise InputError(
            f"rank {rank()} finds {gpus} GPU(s) here and all taken; start "
            f"--nproc-per-node={gpus}, or give device=cpu"
        )
    torch.cuda.set_device(own)
    return f"cuda:{own}"


def speaks_of_failure() -> bool:
    """Whether this rank prints the error: only the first rank that fails does.

    A rank that ends makes `torchrun` stop the others, so whichever fails first must speak.
    """
    if size() == 1:
        return True
    with contextlib.suppress(RuntimeError):  # no store answers any more
        store = _met or _torchruns()
        return rank() == 0 if store is None else store.add("lsa.failures", 1) == 1
    return True


def _torchruns() -> Any:
    """The store of `torchrun` itself, which answers before ranks have met; None without one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=STORE_ANSWERS))
    return store


@contextlib.contextmanager
def _lost_told() -> Iterator[None]:
    """Turn a broken connection into one plain line."""
    try:
        yield
    except RuntimeError as error:  # all that gloo and NCCL raise
        reason = first_line(error).partition(". ")[0]  # without general advice
        raise InputError(
            f"rank {rank()} of {size()} has lost another ({reason}); start all again, and if it "
            "recurs look for a process out of memory"
        ) from None
