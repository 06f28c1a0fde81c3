"""How much is computed at once: samples per pass, memory for graphs, layout of images.

The rules were measured. `configure` or the environment overrides them for a process.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lsa.runtime import heap, variables
from lsa.runtime.errors import InputError

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MOST = 512  # samples in one pass on a CPU
MOST_ON_CARD = 4096
PASS = 0.125  # of the free memory of a GPU may be taken by one pass
GRAPHS = 8  # bytes that a product may need per byte that a pass saves; what it keeps: 1.7 to 5
PIXELS = 1 << 16  # of the images in one pass through convolutions on a CPU
FEW_CHANNELS = 16  # with fewer, the gradient of a strided 1×1 convolution may corrupt memory
BASIS = 100  # vectors that a search holds, or twice the least where that is more
SHARE = 0.5  # of the free memory may hold graphs, on a CPU by a process that uses all of its cores
# Limit and use of a container or a batch job, in the second and the first version of cgroup.
LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Settings:
    """The user's settings for all landscapes of this process; None leaves the choice to a rule."""

    chunk: int | None = None  # samples per pass
    memory: int | None = None  # bytes that graphs may hold from one product to the next
    layout: str | None = None  # of images, a key of `LAYOUTS`
    check: bool = True  # whether a probe first asks `lsa.landscape.consistency`


_configured = Settings()
_environment = Settings()


def settings() -> Settings:
    """The settings of this process: those of `configure`, then those of the environment."""
    a, b = _configured, _environment
    return Settings(
        b.chunk if a.chunk is None else a.chunk,
        b.memory if a.memory is None else a.memory,
        a.layout or b.layout,
        a.check and b.check,
    )


def configure(**changed: Any) -> None:
    """Set defaults for every landscape that this process makes from now on.

    Args:
        **changed: Fields of `Settings`: `chunk`, `memory`, `layout`, `check`.

    Raises:
        InputError: No such field, or a value that it cannot have.
    """
    global _configured
    unknown = sorted(set(changed) - set(Settings.__dataclass_fields__))
    if unknown:
        known = ", ".join(Settings.__dataclass_fields__)
        raise InputError(f"there is no setting {unknown[0]!r}; choose from {known}")
    new = replace(_configured, **changed)
    for name, least in (("chunk", 1), ("memory", 0)):
        value = getattr(new, name)
        if value is not None and (not isinstance(value, int) or value < least):
            raise InputError(f"{name}={value!r} is no whole number ≥ {least}; correct it")
    if new.layout is not None and new.layout not in LAYOUTS:
        raise InputError(f"layout={new.layout!r}; choose {' or '.join(LAYOUTS)}")
    _configured = new


def from_environment() -> None:
    """Read the settings that the environment names. Commands and tracked steps call this.

    Raises:
        InputError: A variable has a value that its setting cannot have.
    """
    global _environment
    _environment = Settings(
        variables.whole_number(variables.CHUNK, 1),
        variables.whole_number(variables.GRAPH_MEMORY, 0),
        variables.word(variables.LAYOUT, LAYOUTS),
        not variables.off(variables.CONSISTENCY),
    )


def cache_size(model: nn.Module, x: Tensor) -> int:
    """Samples per pass that stay in a CPU's cache.

    Measured with simple_cnn: per Hessian product 32 to 64 CIFAR images at once are 1.7 times
    faster than 512 on an EPYC, 64 are 1.04 to 1.2 times faster than 32 on a Xeon, those of resnet20
    as well, and 512 images of 8×8 pixels 1.7 times faster than 64. A network that convolves nothing
    keeps little of an image: an epoch of an mlp on them takes 1.3 times as long with parts of 32 as
    with batches of 128.

    Args:
        model: Of which only the shapes of the parameters count.
        x: Inputs `(N, …)`, of which only the shape counts.
    """
    if not convolves(model):
        return MOST
    return min(MOST, max(16, PIXELS // x[0, 0].numel())) if x.ndim == 4 else 64


def convolves(model: nn.Module) -> bool:
    """Whether a network has convolutions, whose speed depends on the memory layout of images."""
    return any(p.ndim > 2 for p in model.parameters())


def image_layout(
    model: nn.Module, x: Tensor, layout: str | None = None
) -> torch.memory_format | None:
    """Memory layout for a network's inputs: one of `LAYOUTS` for images that it convolves.

    Args:
        model: The network.
        x: Inputs `(N, …)`.
        layout: Name of a layout. Default is the process's setting, else `channels_last`: with
            contiguous images an epoch of simple_cnn takes a Xeon 1.3 times as long, most of it in
            max pooling. It is `contiguous` where torch's gradient corrupts memory otherwise.

    Returns:
        The layout; None for inputs that are left as they are.
    """
    if x.ndim != 4 or not convolves(model):
        return None
    safe = x.device.type != "cpu" or not any(map(_corrupts, model.modules()))
    return LAYOUTS[layout or settings().layout or ("channels_last" if safe else "contiguous")]


def _corrupts(module: nn.Module) -> bool:
    """Whether torch's gradient of a layer, with channels last, writes beyond its memory on a CPU.

    That of a 1×1 convolution with a stride and fewer than 16 input channels does, as in the first
    layers of RepVGG and MobileOne (seen in torch 2.14 with glibc's checks, on images of 96×96 and
    128×128; not with 16 channels or more, in groups, or with contiguous images).
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.groups == 1
        and module.in_channels < FEW_CHANNELS
    )


def laid_out(x: Tensor, layout: torch.memory_format | None) -> Tensor:
    """Inputs `(N, …)` in a memory layout, copied only if they are in another; None: any."""
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
    threads = torch.get_num_threads()
    return int(SHARE * min(1.0, threads / _cores()) * free_memory())


def room(device: torch.device) -> float:
    """Bytes that the graphs of one pass may hold: half of what is free, which their use may double.

    No limit for ranks, of which all must compute alike.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return math.inf
    return SHARE * (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory())


def vectors(theta: Tensor) -> int:
    """How many vectors like θ a basis may hold: half of what is free, at least 1.

    Beside the basis an eigensolver holds some ten vectors more.
    """
    device = theta.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return int(max(1, SHARE * free // theta.nbytes))


def basis(theta: Tensor, pairs: int) -> int:
    """Most vectors that a search may hold in the free memory; with fewer it restarts more often.

    Args:
        theta: θ `(d,)`, whose dtype and device the vectors have.
        pairs: Eigenpairs wanted, which need four vectors more than that.

    Raises:
        InputError: The memory does not hold these.
    """
    room, least = vectors(theta), min(len(theta), pairs + 4)
    if room < least:
        raise InputError(
            f"{pairs} eigenpairs of {len(theta):,} parameters need a basis of {least} vectors, "
            f"{least * theta.nbytes / 1e9:.1f} GB, and half of the free memory holds {room}; take "
            "fewer, parameters of some layers, or a machine with more memory"
        )
    return min(room, max(BASIS, 2 * least))


def free_memory() -> int:
    """Bytes of main memory that may still be taken here, by the machine and by its container."""
    heap.give_back()
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
