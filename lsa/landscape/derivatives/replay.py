"""CUDA graphs: the kernels of a function recorded once and launched together from then on.

A small network on a large card waits for Python: an mlp's Hessian product over four chunks of 512
images takes an H200 5 to 7 ms launched one kernel at a time, and 0.9 ms replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EAGER = 2  # calls before the recording: what is kept is built, libraries and allocator warm up

Function = Callable[..., Any]  # of tensors, to a tensor or a tuple of tensors


def replayed(function: Function, device: torch.device) -> Function:
    """A function as a CUDA graph, replayed from the third call with tensors of one shape.

    It must be a fixed function of its arguments: what Python decides within it is decided once. One
    that asks the GPU for a number cannot be recorded, and runs as it is. All calls run on one
    stream of their own, because a recording must find there what earlier calls have built.

    Args:
        function: Of tensors of any shapes.
        device: Where it computes; on a CPU the function itself is returned.
    """
    return _Replayed(function, device) if device.type == "cuda" else function


class _Replayed:
    def __init__(self, function: Function, device: torch.device) -> None:
        self._function = function
        self._stream = torch.cuda.Stream(device)
        self._calls: dict[Any, int] = {}
        self._recordings: dict[Any, _Recording | None] = {}

    def __call__(self, *arguments: Tensor) -> Any:
        current = torch.cuda.current_stream(self._stream.device)
        key = tuple((a.shape, a.dtype) for a in arguments)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._run(key, arguments)
        current.wait_stream(self._stream)
        return result

    def _run(self, key: Any, arguments: tuple[Tensor, ...]) -> Any:
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] > EAGER and key not in self._recordings:
            self._recordings[key] = _record(self._function, arguments, self._stream)
        recording = self._recordings.get(key)
        return recording(arguments) if recording else self._function(*arguments)


class _Recording:
    """A recorded call: arguments are copied to where it read them, results from where it wrote."""

    def __init__(
        self, function: Function, arguments: tuple[Tensor, ...], stream: torch.cuda.Stream
    ) -> None:
        self._read = [a.detach().clone() for a in arguments]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._written = function(*self._read)

    def __call__(self, arguments: tuple[Tensor, ...]) -> Any:
        for buffer, argument in zip(self._read, arguments, strict=True):
            buffer.copy_(argument)
        self._graph.replay()
        if isinstance(self._written, Tensor):
            return self._written.clone()
        return tuple(part.clone() for part in self._written)


def _record(
    function: Function, arguments: tuple[Tensor, ...], stream: torch.cuda.Stream
) -> _Recording | None:
    """The recording; none where the function waits for the GPU, or memory does not suffice."""
    try:
        return _Recording(function, arguments, stream)
    except RuntimeError:
        torch.cuda.synchronize(stream.device)
        return None
