"""The steps of a study, and which of them run when."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lsa import probe, project
from lsa.figures import notebook
from lsa.project import TRAJECTORY, Project
from lsa.runtime import arguments, failures
from lsa.runtime.errors import Diverged, InputError, first_line, plain
from lsa.studies import calls
from lsa.studies.calls import TRAIN, Call
from lsa.studies.engines.local import Engine, Processes
from lsa.studies.handle import LOST, Handle
from lsa.studies.view import View, quiet
from lsa.tracking import recording, runs, spool, store

BUDGET = ("epochs", "batch_size", "lr")  # what a training may override
TRIES = 2  # of a step whose process dies under it
POLL = 0.2  # seconds between two looks at the workers' progress


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
        """Add a step. It starts when its inputs have finished and a worker is free.

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
        handle = Handle(call, inputs, self.advance)
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
        declared = probe.find(name.removeprefix(TRAJECTORY))
        trajectory = name != declared.name
        if trajectory:
            project.check_per_checkpoint(declared, f"step {name}", self.setting.train)
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
        rows = [(h.call.label, h.state, h.error or h.stored_in) for h in self.handles]
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
        """Steps that are measured and wait in the spool."""
        return [handle for handle in self.handles if handle.state == "unlogged"]

    @property
    def failures(self) -> list[Handle]:
        """Steps that failed, without those skipped because of them."""
        return [handle for handle in self.handles if handle.state == "failed"]


def _line(error: Exception) -> str:
    """An error in one line; the whole of an unforeseen one is in its run's traceback."""
    if store.away(error):
        return store.explained(error)
    refused = failures.explained(error)
    first = refused or plain(first_line(error))
    foreseen = refused or isinstance(error, (InputError, Diverged))
    return first if foreseen else f"{type(error).__name__}: {first}"
