"""The steps of a study as Ray tasks: on this machine's cores, or on those of a cluster.

A step is one task, and a step's result is an object whose reference its dependents take, so Ray
starts each where and when its inputs and its resources are there. A task whose worker or machine is
lost is tried again on another; what it had begun in the store is ended as killed.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from typing import Any

import psutil

from lsa.runtime import heap, signals
from lsa.runtime.errors import InputError, first_line
from lsa.studies import progress
from lsa.studies.engines import local
from lsa.studies.engines.news import News
from lsa.tracking import attached, recording, runs, store

RETRIES = 3  # of a step whose worker is lost: more than of a local one, since machines are lost too
OBJECTS = 100 << 20  # bytes of a local Ray's object store: results are a few numbers
CONTEXT = 600 << 20  # bytes of a GPU that a process takes before it computes


@dataclass(frozen=True)
class Cluster:
    """Resources of a Ray cluster: sums over all machines, and the largest machine."""

    cpus: float
    gpus: float
    largest_cpus: float
    largest_memory: float  # bytes


@dataclass(frozen=True)
class Demand:
    """Resources that one step uses while it runs."""

    cpus: int
    gpus: float = 0.0
    memory: int = 0  # bytes of the machine's


def connect(address: str | None) -> Cluster:
    """Join the cluster at an address, else that of RAY_ADDRESS, else start Ray on this machine.

    Raises:
        InputError: Ray is not installed, there is none at the address, or its machines could not
            reach the store.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local one would report to its makers
    # A local one would yield to all other work of this machine, and could stand still beside it.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise InputError(
            "engine ray needs the package ray; pip install 'loss-landscape-analysis[ray]'"
        ) from None
    where = address or os.environ.get("RAY_ADDRESS", "local")
    alone: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECTS}
    own = signal.getsignal(signal.SIGTERM)
    try:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(where, **quiet, **(alone if where == "local" else {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"cannot join the Ray cluster at {where}: {reason}") from None
    finally:
        signal.signal(signal.SIGTERM, own)  # Ray's would exit without ending the study's run
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if len(machines) > 1 and store.uri().startswith("sqlite"):
        ray.shutdown()
        raise InputError(
            f"the store {store.uri()} is a file of this machine and the cluster has "
            f"{len(machines)} machines; start `mlflow server` and set MLFLOW_TRACKING_URI"
        )
    return Cluster(
        cpus=sum(m.get("CPU", 0) for m in machines),
        gpus=sum(m.get("GPU", 0) for m in machines),
        largest_cpus=max(m.get("CPU", 0) for m in machines),
        largest_memory=max(m.get("memory", 0) for m in machines),
    )


def demand(
    kind: str, offered: Cluster, peaks: Mapping[str, int], device: str, workers: int | None
) -> Demand:
    """Resources that one step of a kind uses.

    Args:
        kind: Of the step.
        offered: By the cluster.
        peaks: Bytes that each kind of step is expected to take; of others nothing is known.
        device: Where steps compute, as the user says it.
        workers: Steps that are to run side by side; as many as there are CPUs by default.
    """
    share = offered.cpus // workers if workers else 1
    cpus, needed = max(1, int(min(share, offered.largest_cpus))), peaks.get(kind, 0)
    if offered.gpus and device != "cpu":
        return Demand(cpus, gpu_share(needed, gpu_memory()))
    # What exceeds every machine runs alone on the largest.
    return Demand(cpus, memory=int(min(needed, offered.largest_memory)))


def gpu_memory() -> int:
    """Memory in bytes of a GPU here, assumed for the whole cluster; 0 without a GPU."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def gpu_share(needed: int, total: int) -> float:
    """Part of a GPU that a step takes, in hundredths: a whole one where nothing is known.

    As if all that its process needs were on the GPU, which is more than will be.
    """
    return min(1.0, math.ceil(100 * (needed + CONTEXT) / total) / 100) if total and needed else 1.0


class RayTasks:
    """Runs calls as Ray tasks; `connect` comes first. Nothing else may use this process's Ray."""

    background = chained = True
    slots = math.inf

    def __init__(self, demand: Callable[[str], Demand], project: str, parent: str) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        self._ray = ray
        self._demand = demand
        self._news = ray.remote(num_cpus=0)(News).remote()
        self._asked: Any = None  # what it was last asked for, and has not answered
        self._setting = (*store.addresses(), parent, project, os.getcwd())
        self._references: dict[Future, Any] = {}

    def submit(self, function: Callable[..., Any], call: Any, *needs: Future) -> Future:
        """The future of a call, which starts when those that it needs have results."""
        needed = self._demand(call.step)
        task = self._ray.remote(_task).options(
            num_cpus=needed.cpus,
            num_gpus=needed.gpus,
            memory=needed.memory,
            max_retries=RETRIES,
            name=call.label,
        )
        sources = [self._references[need] for need in needs]
        setting = (*self._setting, needed.cpus)
        reference = task.remote(setting, self._news, function, call, *sources)
        outcome: Future = Future()
        self._references[outcome] = reference
        reference.future().add_done_callback(functools.partial(_settle, outcome))
        return outcome

    def cancel(self, future: Future) -> None:
        """Drop a call: one that has begun ends as killed."""
        self._ray.cancel(self._references[future])

    def news(self) -> Iterator[tuple[str, int, int, str]]:
        """Progress that the workers have reported since the last call.

        It is not waited for: the actor may start after the steps, and a study that stands still
        until then would not notice that one has failed.
        """
        self._asked = self._asked or self._news.take.remote()
        if self._ray.wait([self._asked], timeout=0)[0]:
            told, self._asked = self._ray.get(self._asked), None
            yield from told

    def shutdown(self) -> None:
        """Leave the cluster; what has not finished ends as killed."""
        left = [future for future in self._references if not future.done()]
        for future in left:
            self.cancel(future)
        wait(left, local.PATIENCE)
        workers = [child for child in psutil.Process().children(recursive=True) if _is_rays(child)]
        self._ray.shutdown()
        psutil.wait_procs(workers, timeout=local.PATIENCE)


def _is_rays(process: psutil.Process) -> bool:
    """Whether a process below this one is of a cluster that was started here."""
    try:
        return process.name().startswith("ray")
    except psutil.NoSuchProcess:
        return False


def _settle(outcome: Future, done: Future) -> None:
    """Pass on a task's outcome, with the step's own error instead of Ray's."""
    from ray import exceptions  # pyright: ignore[reportMissingImports]

    error: Any = done.exception()
    if error is None:
        outcome.set_result(done.result())
    elif isinstance(error, exceptions.TaskCancelledError):
        outcome.set_exception(CancelledError())
    elif isinstance(error, exceptions.RayTaskError):
        outcome.set_exception(error.cause)
    else:  # the system's
        reason = first_line(error)
        outcome.set_exception(
            InputError(f"its worker was lost {RETRIES + 1} times (out of memory?): {reason}")
        )


def _task(
    setting: tuple[Any, ...], news: Any, function: Callable[..., Any], call: Any, *sources: Any
) -> Any:
    """Run a call in a Ray worker."""
    _begin(*setting)
    last = 0.0

    def tell(title: str, done: int, total: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > local.NEWS:
            last = time.monotonic()
            news.tell.remote(title, done, total, text)

    progress.redirect(tell)
    tell(call.label, 0, 0, "")
    with signals.caught():
        try:
            return function(call, *sources)
        except BaseException as error:
            stop = signals.behind(error)
            if stop is None:
                raise
            if stop.exit_code == 128 + signal.SIGINT:  # `cancel`
                raise KeyboardInterrupt from None
            os._exit(stop.exit_code)  # its machine stops: Ray tries the step again elsewhere
        finally:
            heap.give_back()


@functools.lru_cache(maxsize=1)
def _begin(uri: str, registry: str, parent: str, project: str, folder: str, threads: int) -> None:
    """Make a Ray worker the study's, and end the runs of those that were lost on its machine."""
    import torch

    if os.path.isdir(folder):  # on another machine it may not be
        os.chdir(folder)
    attached.forget()
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    heap.keep()
    torch.set_num_threads(threads)
    store.use(uri, registry)
    recording.adopt(parent)
    runs.end_stale("project", project)
