"""Where the steps of a study run: in this process, or in several that share its cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from lsa.runtime import heap, signals
from lsa.studies import progress
from lsa.studies.engines import workers
from lsa.tracking import attached, recording, store

NEWS = 0.2  # seconds between two reports of a worker's progress
PATIENCE = 20.0  # seconds that a stopped worker has for ending its run


class Engine(Protocol):
    """Runs steps. A future among a call's arguments stands for that call's result."""

    @property
    def background(self) -> bool:
        """Whether calls run beside the caller."""
        ...

    @property
    def chained(self) -> bool:
        """Whether a call may be submitted before the calls it depends on have finished."""
        ...

    @property
    def slots(self) -> float:
        """Calls that may be submitted and not finished."""
        ...

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future:
        """The call's future."""
        ...

    def cancel(self, future: Future) -> None:
        """Drop a call."""
        ...

    def news(self) -> Iterator[tuple[str, int, int, str]]:
        """Progress that the workers have reported since the last call."""
        ...

    def shutdown(self) -> None:
        """End the workers; what they have not finished ends as killed."""
        ...


def _results(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments with the results of futures, which have finished, in their place."""
    return [a.result() if isinstance(a, Future) else a for a in arguments]


class Inline(Executor):
    """Runs each call at once, in this process."""

    background = chained = False
    slots = 1

    def cancel(self, future: Future) -> None:
        """Do nothing: the call has already run."""

    def news(self) -> Iterator[tuple[str, int, int, str]]:
        """Nothing: progress is shown at once."""
        return iter(())

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Run the call and return its finished future."""
        done: Future = Future()
        try:
            done.set_result(fn(*_results(args), **kwargs))
        except Exception as error:
            if signals.behind(error):
                raise
            done.set_exception(error)
        return done


class Processes:
    """A pool of worker processes, made again when one of them dies.

    Workers inherit nothing of this process but its environment (`lsa.studies.engines.workers`).
    They are told the store's address and the study's run, and given an equal share of the threads.
    They end when this process does, however it does.
    """

    background, chained = True, False

    def __init__(self, number: int, parent: str | None) -> None:
        import torch

        self.slots = self._number = number
        self._arguments = (
            *store.addresses(),
            parent,
            max(1, torch.get_num_threads() // number),
        )
        self._start()

    def _start(self) -> None:
        context = workers.context()
        self._news = context.SimpleQueue()
        self._pool = ProcessPoolExecutor(
            self._number, context, _begin, (dict(os.environ), *self._arguments, self._news)
        )

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """The call's future; broken like the others where a worker has died a moment ago."""
        try:
            return self._pool.submit(_work, function, *_results(arguments))
        except BrokenProcessPool as error:
            lost: Future = Future()
            lost.set_exception(error)
            return lost

    def cancel(self, future: Future) -> None:
        """Drop a call that has not begun."""
        future.cancel()

    def restart(self) -> None:
        """A new pool in place of a broken one, whose workers are gone."""
        self._pool.shutdown(cancel_futures=True)
        self._start()

    def news(self) -> Iterator[tuple[str, int, int, str]]:
        """Progress that the workers have reported since the last call."""
        while not self._news.empty():
            yield self._news.get()

    def shutdown(self) -> None:
        """End the workers; what they have not finished ends as killed."""
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        deadline = time.monotonic() + PATIENCE
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
        self._pool.shutdown(wait=False, cancel_futures=True)


def _begin(
    environment: dict[str, str],
    uri: str,
    registry: str,
    parent: str | None,
    threads: int,
    news: Any,
) -> None:
    """Make a fresh process a worker."""
    import numpy as np
    import torch

    # A fork has both as they were when the first worker was made.
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # idle, it has nothing to end
    attached.forget()
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    heap.keep()
    torch.set_num_threads(threads)
    store.use(uri, registry)
    if parent:
        recording.adopt(parent)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    last = 0.0

    def tell(title: str, done: int, total: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > NEWS:
            last = time.monotonic()
            news.put((title, done, total, text))

    progress.redirect(tell)


def _end_with_parent() -> None:
    """A worker whose study was killed must not go on alone."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(128 + signal.SIGTERM)  # whatever kept it


def _work(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a call; a signal ends its run as killed, then the process."""
    with signals.caught():
        try:
            return function(*arguments)
        except BaseException as error:
            stop = signals.behind(error)
            if stop:
                os._exit(stop.exit_code)
            raise
        finally:
            heap.give_back()  # another worker's step may need it
