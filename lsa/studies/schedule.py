"""Studies: steps as plain Python, each run once, on one engine.

    from lsa import step, study

    with study("digits", workers=2):
        for lr in (0.02, 0.1):
            trained = step("train", optimizer="sgd", lr=lr)
            sharp = step("lanczos", trained, k=1)
            if sharp["lambda_max"].value > 20:  # waits for the number
                step("sgd_noise", trained)

Passing one step's handle to another is the edge between them. A step that has finished before with
the same options, inputs, data and code is not run again, so a study goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from lsa import probe, project
from lsa.figures import notebook
from lsa.probe import Metric, Result
from lsa.project import FOLLOWED, Project
from lsa.runtime import arguments, failures
from lsa.runtime.errors import Diverged, InputError, first_line, plain
from lsa.studies import calls, progress
from lsa.studies.calls import TRAIN, Call
from lsa.studies.engines.local import Engine, Inline, Processes
from lsa.studies.view import View, quiet
from lsa.tracking import recording, runs, settings, spool, store

# "queued": an engine that waits for a step's inputs by itself has it.
State = Literal["waiting", "queued", "running", "done", "reused", "unlogged", "failed", "skipped"]
BUDGET = ("epochs", "batch_size", "lr")  # what a training may override
ENDS: tuple[State, ...] = ("done", "reused", "unlogged", "failed", "skipped")
LOST: dict[State, str] = {"unlogged": "is not logged", "failed": "failed", "skipped": "failed"}
TRIES = 2  # of a step whose process dies under it
POLL = 0.2  # seconds between two looks at the workers' progress


class Failed(InputError):
    """Steps of a study have failed; the others are done."""


@dataclass(eq=False)
class Handle:
    """A step of a study: waited for when its numbers are asked for."""

    call: Call
    needs: tuple[Handle, ...]
    study: Study | None  # None in another process than the study's
    state: State = "waiting"
    tries: int = 0
    error: str = ""
    future: Future | None = None  # since it was submitted
    _result: Result | None = None

    @property
    def finished(self) -> bool:
        """Whether the step has ended."""
        return self.state in ENDS

    @property
    def result(self) -> Result:
        """What the step measured; its arrays stay in the artifacts of its run.

        Raises:
            InputError: It has failed, or a step that it needs has.
        """
        if self.study is not None:
            self.study.advance(until=self)
        if self._result is None:
            raise InputError(f"{self.call.label}: {self.error}")
        return self._result

    def __getitem__(self, name: str) -> Metric:
        """A number of its result, `handle["lambda_max"]`."""
        return self.result[name]

    def __getstate__(self) -> dict[str, Any]:
        """The finished step, for another process: it is waited for, the study stays here."""
        if self.study is not None:
            self.study.advance(until=self)
        return {**self.__dict__, "study": None, "future": None}

    @property
    def command(self) -> str:
        """The command that repeats it."""
        overridden = any(need.call.options for need in self.needs)
        return self.call.command([need.run_id for need in self.needs] if overridden else ())

    @property
    def run_id(self) -> str:
        """Its run."""
        return self.result.run_id

    @property
    def found_in(self) -> str:
        """The run of its result; empty while there is none."""
        return self._result.run_id if self._result else ""

    def _repr_html_(self) -> str | None:
        return self.result._repr_html_() if self.finished and self._result else None

    def __repr__(self) -> str:
        return f"<{self.call.label}: {self.state}{self.error and f' ({self.error})'}>"


class Study:
    """The steps of a study in the order in which they were asked for."""

    def __init__(
        self,
        setting: Project,
        engine: Engine,
        opened: recording.Run | None = None,
        *,
        device: str = "auto",
        keep_going: bool = True,
        view: View | None = None,
    ) -> None:
        self.setting = setting
        self.opened = opened  # the run whose children the steps are
        self.handles: list[Handle] = []
        self._engine = engine
        self._device = device
        self._keep_going = keep_going
        self._view = view or quiet()
        self._running: dict[Future, Handle] = {}

    def step(self, name: str, *inputs: Handle, **options: Any) -> Handle:
        """Ask for a step; it starts when its inputs are there and a worker is free.

        Args:
            name: `train`, a probe, or `trajectory.<probe>`.
            *inputs: The training whose checkpoint a probe takes; two for a pair probe, up to
                three for one with the input `others`.
            **options: Of the step: a probe's own; for `train` `optimizer`, `seed`, and `epochs`,
                `batch_size`, `lr` to override the project's. The rest are the project's.

        Raises:
            InputError: An unknown step, option or optimizer, or inputs that do not fit.
        """
        name = arguments.text("step", name)
        if strange := [given for given in inputs if not isinstance(given, Handle)]:
            raise InputError(
                f"a {type(strange[0]).__name__} is no step of a study; give what step(…) returns"
            )
        call = self._training(options) if name == TRAIN else self._probe(name, inputs, options)
        handle = Handle(call, inputs, self)
        self.handles.append(handle)
        if self._engine.background:
            self._start()  # beside what the caller does next
        return handle

    def _training(self, options: dict[str, Any]) -> Call:
        if "optimizer" not in options:
            raise InputError("train needs optimizer=…, as the project names it")
        rest = {k: v for k, v in options.items() if k not in ("optimizer", "seed")}
        for name in rest:
            if name not in BUDGET:
                raise InputError(
                    f"train has no option {name!r}; it takes optimizer, seed, {', '.join(BUDGET)}"
                )
        recipe = self.setting.recipe(options["optimizer"], options.get("seed"), **rest)
        return Call(TRAIN, self.setting, (recipe.optimizer,), (recipe.seed,), rest, self._device)

    def _probe(self, name: str, inputs: tuple[Handle, ...], options: dict[str, Any]) -> Call:
        declared = probe.find(name.removeprefix(FOLLOWED))
        trajectory = name != declared.name
        if trajectory:
            project.check_followable(declared, f"step {name}", self.setting.train)
        least, most = 1 + declared.pair, 1 if trajectory else declared.most
        if not least <= len(inputs) <= most or any(i.call.step != TRAIN for i in inputs):
            wanted = most if least == most else f"{least} to {most}"
            raise InputError(
                f"{name} takes {wanted} training(s) as its input(s): step({name!r}, …)"
            )
        usual = self.setting.options(declared, trajectory=trajectory)
        resolved = project.resolve(declared, usual | options, f"step {name}")
        optimizers = tuple(i.call.optimizers[0] for i in inputs)
        seeds = tuple(i.call.seeds[0] for i in inputs)
        return Call(name, self.setting, optimizers, seeds, resolved, self._device)

    def _repr_html_(self) -> str:
        rows = [(h.call.label, h.state, h.error or h.found_in) for h in self.handles]
        return notebook.table(f"study of {self.setting.name}", ("step", "state", "run"), rows)

    # --- running ----------------------------------------------------------------------------------

    def advance(self, until: Handle | None = None) -> None:
        """Run until a handle has finished, or all have."""
        while not (until.finished if until else all(h.finished for h in self.handles)):
            self._start()
            if not self._running:
                continue
            done, _ = wait(self._running, POLL, FIRST_COMPLETED)
            self._heed(self._engine.news())
            self._collect(done)
            self._view.refresh(self.handles)

    def _start(self) -> None:
        """Start what can start; skip what cannot any more."""
        for handle in self.handles:
            if handle.state != "waiting":
                continue
            if self._skipped(handle):
                continue
            if len(self._running) >= self._engine.slots:
                return
            if self._engine.chained or all(need.finished for need in handle.needs):
                self._submit(handle)

    def _skipped(self, handle: Handle) -> bool:
        """Skip a step that is not to run any more."""
        lost = next((need for need in handle.needs if need.state in LOST), None)
        if lost or self._stopped():
            handle.state, handle.error = "skipped", "not run"
            if lost:
                handle.error += f": {lost.call.label} {LOST[lost.state]}"
        return handle.state == "skipped"

    def _submit(self, handle: Handle) -> None:
        handle.state = "queued" if self._engine.chained else "running"
        handle.tries += 1
        self._view.refresh(self.handles)
        inputs = [need.future or need._result for need in handle.needs]
        future = handle.future = self._engine.submit(calls.perform, handle.call, *inputs)
        self._running[future] = handle
        if not self._engine.background:
            self._collect({future})

    def _heed(self, news: Iterable[tuple[str, int, int, str]]) -> None:
        """Show progress; what makes some is running."""
        told = {item[0]: item for item in news}
        # What was dropped stays queued, though it had begun: how it ends is no failure of its own.
        for handle in self._running.values() if told and not self._stopped() else ():
            if handle.state == "queued" and handle.call.label in told:
                handle.state = "running"
        for item in told.values():
            self._view.progress(*item)

    def _stopped(self) -> bool:
        return not self._keep_going and any(h.state == "failed" for h in self.handles)

    def _collect(self, futures: Collection[Future]) -> None:
        # One that another needs may be taken with it, and is then no longer there.
        broken = [ended for ended in futures if ended in self._running and self._broke(ended)]
        if broken and isinstance(self._engine, Processes):
            for future in list(self._running):  # they broke with it
                self._broke(future)
            store.ask(lambda: runs.end_stale("project", self.setting.name), [])
            self._engine.restart()

    def _broke(self, future: Future) -> bool:
        """Take the outcome of a step; whether the pool of processes broke under it."""
        handle, broke = self._running.pop(future), False
        for need in handle.needs:  # what it needs has ended, and may be why it has
            if need.future in self._running:
                self._broke(need.future)
        try:
            done = future.result()
            handle._result, handle.state = done, "reused" if done.reused else "done"
        except BrokenProcessPool:
            broke = True
            handle.state, handle.error = "waiting", "its process died (out of memory?)"
            if handle.tries >= TRIES:
                handle.state = "failed"
        except spool.NotLogged as error:
            handle.state, handle.error = "unlogged", str(error)
        except Exception as error:
            if not (handle.state == "queued" and self._skipped(handle)):
                handle.state, handle.error = "failed", _line(error)
                self._drop()
        if handle.finished and handle.state != "skipped":
            self._view.finished(handle)
        return broke

    def _drop(self) -> None:
        """After a failure that stops the study, drop what is queued."""
        if self._stopped():
            for future, handle in self._running.items():
                if handle.state == "queued":
                    self._engine.cancel(future)

    @property
    def unlogged(self) -> list[Handle]:
        """What is measured and waits in the spool."""
        return [handle for handle in self.handles if handle.state == "unlogged"]

    @property
    def failures(self) -> list[Handle]:
        """What failed, without what was skipped because of it."""
        return [handle for handle in self.handles if handle.state == "failed"]


def _line(error: Exception) -> str:
    """An error in one line; the whole of an unforeseen one is in its run's traceback."""
    if store.away(error):
        return store.explained(error)
    refused = failures.explained(error)
    first = refused or plain(first_line(error))
    foreseen = refused or isinstance(error, (InputError, Diverged))
    return first if foreseen else f"{type(error).__name__}: {first}"


_current: ContextVar[Study | None] = ContextVar("study", default=None)


@contextlib.contextmanager
def study(
    setting: Project | str | os.PathLike[str] = project.DEFAULT,
    *,
    name: str = "",
    kind: str = "study",
    workers: int = 1,
    device: str = "auto",
    keep_going: bool = True,
    view: View | None = None,
    engine: Callable[[str], Engine] | None = None,
) -> Iterator[Study]:
    """A study: the steps asked for inside, run by the end of the block, as children of one run.

    That run is the study's for good: when it is started again, it goes on in the same run, so that
    the UI shows one group of steps however often it was stopped.

    Args:
        setting: A project or its name.
        name: Of the study's run; `<kind>-<project>` by default.
        kind: What its run is found by.
        workers: Processes that run steps side by side, sharing the threads.
        device: Where to compute.
        keep_going: After a failed step, go on with those that do not need it.
        view: Shown what happens.
        engine: Makes, from the study's run, another place for its steps than processes here.

    Raises:
        Failed: At the end of the block: steps have failed; the first is named.
        NotLogged: At the end of the block: the store did not take what was measured.
    """
    workers = arguments.whole("workers", workers, least=1)
    name = arguments.text("name", name)
    setting = setting if isinstance(setting, Project) else project.load(setting)
    tags = {"lsa.step": kind, "project": setting.name}
    name = name or f"{kind}-{setting.name}"
    with (
        settings.restored(),
        recording.run(
            name, experiment=setting.name, tags=tags, device="cpu", again=_begun(name, tags)
        ) as opened,
    ):
        opened.params({"project": setting.name})
        opened.json(setting.model_dump(), "project.json")
        opened.send()
        if engine is not None:
            pool = engine(opened.id)
        else:
            pool = Processes(workers, opened.id) if workers > 1 else Inline()
        running = Study(setting, pool, opened, device=device, keep_going=keep_going, view=view)
        token = _current.set(running)
        if view is not None:
            progress.redirect(view.progress)
        try:
            yield running
            running.advance()
        finally:
            progress.redirect(None)
            _current.reset(token)
            pool.shutdown()
            if pool.background:  # a worker that was ended by force could not end its run
                store.ask(lambda: runs.end_stale("project", setting.name), [])
        states = [handle.state for handle in running.handles]
        opened.metrics({f"steps_{state}": states.count(state) for state in ENDS})
        if running.failures:
            first, waiting = running.failures[0], len(running.unlogged)
            also = f"; {waiting} more are measured, not logged: lsa sync" if waiting else ""
            raise Failed(
                f"{len(running.failures)} of the study's {len(states)} steps failed: "
                f"{first.call.label}: {first.error}; repeat it with: {first.command}{also}"
            )
        if running.unlogged:
            raise spool.NotLogged(
                f"{len(running.unlogged)} of the study's {len(states)} steps are measured, not "
                f"logged; they are kept in {spool.folder()}; deliver them with: lsa sync, then "
                "start the study again"
            )


def _begun(name: str, tags: Mapping[str, str]) -> str | None:
    """The run of a study that was begun before; runs of its project that were left open end."""
    runs.end_stale("project", tags["project"])
    return runs.ended(name, tags)


def step(name: str, *inputs: Handle, **options: Any) -> Handle:
    """Add a step to the study of the enclosing `with`; outside of one, run the step at once.

    Args and errors are those of `Study.step`; outside a study, `project` names the project, and
    what fails raises.
    """
    around = _current.get()
    if around is not None:
        return around.step(name, *inputs, **options)
    known = [given.call.setting for given in inputs if isinstance(given, Handle)]
    setting = known[0] if known else project.load(options.pop("project", project.DEFAULT))
    alone = Study(setting, Inline())
    handle = alone.step(name, *inputs, **options)
    _ = handle.result  # raises what failed
    return handle
