"""How much at once: samples per pass, and memory for graphs that are kept."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

PIXELS = 1 << 15  # of the images in one pass on a CPU
SHARE = 8  # of the free memory, an eighth may hold graphs


def cache_size(x: Tensor) -> int:
    """Samples per pass that stay in a CPU's cache; on a GPU more, to fill the card.

    Measured with simple_cnn: per Hessian product 32 to 64 CIFAR images at once are 1.7 times
    faster than 512, and 512 images of 8×8 pixels 1.7 times faster than 64.
    """
    if x.device.type != "cpu":
        return 512
    return min(512, max(16, PIXELS // x[0, 0].numel())) if x.ndim == 4 else 64


def graph_memory(device: torch.device) -> int:
    """Bytes that graphs may hold from one product to the next: a part of what is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return psutil.virtual_memory().available // SHARE
