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
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from lsa import project
from lsa.project import Project
from lsa.runtime import arguments
from lsa.runtime.errors import InputError
from lsa.studies import progress
from lsa.studies.engines.local import Engine, Inline, Processes
from lsa.studies.handle import ENDS, Handle
from lsa.studies.schedule import Study
from lsa.studies.view import View
from lsa.tracking import recording, runs, settings, spool, store


class Failed(InputError):
    """Steps of a study have failed; the others are done."""


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
    workers = arguments.whole_number("workers", workers, least=1)
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
        store.insist(opened.send)
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
