"""Two real processes that meet as `torchrun` makes them meet."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from typing import Any

from processes import forks

from lsa.runtime import ranks


def on_two_ranks(function: Callable[[], Any]) -> list[Any]:
    """What a module's function returns on each of two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = forks()
    pipes, processes = [], []
    for rank in range(2):
        here, there = context.Pipe(duplex=False)
        process = context.Process(
            target=_begin, args=(rank, port, function, there, {**os.environ}), daemon=True
        )
        process.start()
        there.close()  # so that a dead process is the end of the file
        pipes.append(here)
        processes.append(process)
    try:
        return [pickle.loads(pipe.recv_bytes()) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _begin(
    rank: int, port: int, function: Callable[[], Any], answer: Any, given: dict[str, str]
) -> None:
    os.environ |= given  # of this test: the forked process has an earlier one's
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    with ranks.joined():
        answer.send_bytes(pickle.dumps(function()))  # tensors by value: the process then ends
