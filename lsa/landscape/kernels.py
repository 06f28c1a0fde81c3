"""Kernels that can be differentiated twice, in place of fused and compiled ones."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def plain_kernels(recurrent: bool = False, normed: bool = False) -> Iterator[None]:
    """Attention and weight norm by their formulas, recurrent layers without oneDNN and cuDNN.

    Their fused kernels lack second and forward derivatives, or have wrong ones: the second
    derivative of torch's weight norm was 27 to 56 % off (torch 2.14).
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if normed:
                stack.enter_context(_PlainWeightNorm())
            if recurrent:
                with warnings.catch_warnings():  # about GPUs that are not there
                    warnings.simplefilter("ignore")
                    stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                    stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def eager() -> Iterator[None]:
    """Within the block what `torch.compile` has compiled runs as it is written.

    Compiled code has no second derivatives, and each new kind of pass would be compiled: of the few
    times that torch does so for a function, none would be left for the training.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _PlainWeightNorm(TorchFunctionMode):
    """Within the block `w = g v/‖v‖` is computed by operations that can be differentiated twice."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """The operation itself, or weight norm by its formula."""
        if func is not torch._weight_norm:  # pyright: ignore[reportPrivateImportUsage]
            return func(*args, **(kwargs or {}))

        def formula(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
            rest = [i for i in range(v.ndim) if i != dim % v.ndim or dim == -1]
            return v * (g / v.square().sum(rest, keepdim=True).sqrt())

        return formula(*args, **(kwargs or {}))


def norms_weights(module: nn.Module) -> bool:
    """Whether a module is the parametrization, or has the older hook, of `weight_norm`."""
    hooks = module._forward_pre_hooks.values()
    return any("WeightNorm" in type(m).__name__ for m in (module, *hooks))
