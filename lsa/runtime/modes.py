"""The global modes of torch: lsa's numbers are the same whatever the caller has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def usual(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Gradients on, a default dtype, the CPU by default; the caller's modes come back at the end.

    Inside `torch.inference_mode()` no derivative can be had. Under another default dtype one seed
    draws other numbers, and under another default device data would lie there.
    """
    before = torch.get_default_dtype()
    elsewhere = torch.empty(0).device.type != "cpu"
    torch.set_default_dtype(dtype)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu") if elsewhere else contextlib.nullcontext(),
        ):
            yield
    finally:
        torch.set_default_dtype(before)
