"""How much at once, and how: samples per pass, memory for graphs, layout, mode, threads.

All follow from rules here that were measured. Where work is long `lsa.passes` asks the machine.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from lsa.landscape.derivatives.modes import MODES
from lsa.runtime.errors import InputError

# Variables of the environment that fix what is lsa's choice otherwise.
CHUNK, MEMORY, LAYOUT = "LSA_CHUNK", "LSA_GRAPH_MEMORY", "LSA_LAYOUT"
MODE = "LSA_PRODUCT_MODE"
RULES = "rules"  # value of the first: nothing is measured
THREADS = "OMP_NUM_THREADS"  # PyTorch reads it
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MOST = 512  # samples in one pass on a CPU
MOST_ON_CARD = 4096
PASS = 0.125  # of the free memory of a GPU may be taken by one pass
GRAPHS = 8  # bytes that a product may need per byte that a pass saves; what it keeps: 1.7 to 5
PIXELS = 1 << 16  # of the images in one pass through convolutions on a CPU
SHARE = 0.5  # of the free memory may hold graphs, on a CPU by a process that uses all of its cores
# Limit and use of a container or a batch job, in the second and the first version of cgroup.
LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def fixed_chunk() -> int | None:
    """Samples per pass that the user has fixed in the environment; None where they are lsa's.

    Raises:
        InputError: Neither a whole number ≥ 1 nor `rules`.
    """
    return None if by_rules() else _fixed(CHUNK, 1, f", nor {RULES!r}")


def by_rules() -> bool:
    """Whether the user wants nothing measured."""
    return os.environ.get(CHUNK) == RULES


def fixed_threads() -> bool:
    """Whether the user has fixed the number of threads."""
    return bool(os.environ.get(THREADS))


_given: ContextVar[int | None] = ContextVar("given", default=None)  # threads, where fewer compute


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """Within it so many threads of this process compute; what it has of the memory stays."""
    before = torch.get_num_threads()
    given = _given.set(_given.get() or before)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _given.reset(given)


def fixed_memory() -> int | None:
    """Bytes for graphs that the user has fixed in the environment; None where they are lsa's.

    Raises:
        InputError: No whole number ≥ 0.
    """
    return _fixed(MEMORY, 0)


def fixed_layout() -> str | None:
    """How images lie in memory, of `LAYOUTS`, if the user has fixed it; None where it is lsa's.

    Raises:
        InputError: Another word.
    """
    return _fixed_word(LAYOUT, LAYOUTS)


def fixed_mode() -> str | None:
    """By which mode Hessian products are taken, of `MODES`, if the user has fixed it.

    Raises:
        InputError: Another word.
    """
    return _fixed_word(MODE, MODES)


def check_environment() -> None:
    """Refuse what the variables cannot be.

    Raises:
        InputError: As above.
    """
    fixed_chunk()
    fixed_memory()
    fixed_layout()
    fixed_mode()


def _fixed_word(name: str, words: Collection[str]) -> str | None:
    text = os.environ.get(name, "")
    if text and text not in words:
        raise InputError(f"{name}={text!r} is none of {', '.join(words)}; correct or unset it")
    return text or None


def _fixed(name: str, least: int, else_: str = "") -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    try:
        value = float(text)
        if value.is_integer() and value >= least:
            return int(value)
    except ValueError:
        pass
    raise InputError(f"{name}={text!r} is no whole number ≥ {least}{else_}; correct or unset it")


def cache_size(model: nn.Module, x: Tensor) -> int:
    """Samples per pass that stay in a CPU's cache.

    Measured with simple_cnn: per Hessian product 32 to 64 CIFAR images at once are 1.7 times
    faster than 512 on an EPYC, 64 are 1.04 to 1.2 times faster than 32 on a Xeon, those of resnet20
    as well, and 512 images of 8×8 pixels 1.7 times faster than 64. A network that convolves nothing
    keeps little of an image: an epoch of an mlp on them takes 1.3 times as long with parts of 32 as
    with batches of 128.
    """
    if not convolves(model):
        return MOST
    return min(MOST, max(16, PIXELS // x[0, 0].numel())) if x.ndim == 4 else 64


def convolves(model: nn.Module) -> bool:
    """Whether a network has kernels, to which it matters how images lie."""
    return any(p.ndim > 2 for p in model.parameters())


def image_layout(
    model: nn.Module, x: Tensor, layout: str | None = None
) -> torch.memory_format | None:
    """How inputs of a network shall lie: images that it convolves in a layout of `LAYOUTS`.

    Default is what the user has fixed, else `channels_last`: with contiguous images an epoch of
    simple_cnn takes a Xeon 1.3 times as long, most of it in max pooling. None: as they are.
    """
    if x.ndim != 4 or not convolves(model):
        return None
    return LAYOUTS[layout or fixed_layout() or next(iter(LAYOUTS))]


def laid_out(x: Tensor, layout: torch.memory_format | None) -> Tensor:
    """Inputs in a layout, copied only where they lie otherwise."""
    return x if layout is None else x.contiguous(memory_format=layout)


def card_size(saved: float, device: torch.device) -> int:
    """Samples per pass that fill a GPU, as its free memory allows; a power of two.

    A Hessian product with 2,048 CIFAR images takes an H200 in passes of 512 1.14 times as long as
    at once with simple_cnn, with an mlp 4 times, 2 times when recorded (`replay`).

    Args:
        saved: Bytes that a forward pass saves per sample.
        device: The GPU.
    """
    room = PASS * torch.cuda.mem_get_info(device)[0] / (GRAPHS * saved)
    return 1 << (int(min(max(room, 1), MOST_ON_CARD)).bit_length() - 1)


def graph_memory(device: torch.device) -> int:
    """Bytes that graphs may hold from one product to the next: a part of what is free now.

    A process that was given some of the cores, as a worker beside others is, takes that part of the
    memory's share.
    """
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    threads = _given.get() or torch.get_num_threads()
    return int(SHARE * min(1.0, threads / _cores()) * free_memory())


def free_memory() -> int:
    """Bytes of main memory that may still be taken here, by the machine and by its container."""
    free = psutil.virtual_memory().available
    for limit, used in LIMITS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(free, 0)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
