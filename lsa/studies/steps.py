"""Steps: one tracked call of a training or of a probe, each one MLflow run, made once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lsa import project
from lsa.probe import Probe, Result
from lsa.project import Recipe
from lsa.runtime import locks, provenance, ranks, signals
from lsa.tracking import registry, results, runs, spool, store, sync

log = logging.getLogger(__name__)
DONE = "done"  # what the first rank says of a finished step


def step_key(name: str, module: str, content: Mapping[str, Any]) -> str:
    """Hash of all that determines a step's result: name, inputs, options, code, version of torch.

    Args:
        name: Of the step.
        module: Whose code, with all of lsa that it imports, is part of the key.
        content: Inputs and options, as JSON values.
    """
    identity = {
        "step": name,
        "code": provenance.code_hash(module),
        "torch": provenance.versions()["torch"],
        **content,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def probe_key(
    declared: Probe,
    options: Mapping[str, Any],
    models: Sequence[str],
    samples: int | str,
    seed: int = 0,
    *,
    trajectory: bool = False,
) -> str:
    """Key of a probe's step.

    Args:
        declared: The probe.
        options: All of its options, resolved.
        models: Ids of the checkpoints that it measures.
        samples: Number of samples measured, or "all".
        seed: Of its randomness.
        trajectory: Whether the step runs the probe at each checkpoint of a training.
    """
    content = {"options": options, "inputs": list(models), "samples": samples, "seed": seed}
    name = project.TRAJECTORY + declared.name if trajectory else declared.name
    return step_key(name, declared.function.__module__, content)


def title(step: str, *recipes: Recipe) -> str:
    """Name of a step's run, the optimizer first, by which lists are read: `adamw·lanczos·s0`."""
    optimizers = "–".join(recipe.optimizer for recipe in recipes)
    seeds = ",".join(dict.fromkeys(str(recipe.seed) for recipe in recipes))
    return f"{optimizers}·{step}·s{seeds}"


def once(
    key: str,
    run: Callable[[], Result],
    *,
    reuse: bool,
    read: Callable[[str], Result] = results.read,
) -> Result:
    """Run a step alone on this machine, or read the finished one with its key.

    A step that was measured but not logged is delivered, and not measured again. A finished run
    that does not hold what the step logs does not count, whoever has given it the key.

    Args:
        key: Of the step.
        run: Runs it.
        reuse: Whether a finished step counts.
        read: Reads a finished step's result back, by its run ID.
    """
    with locks.claim(store.identity(), key):
        done = _finished(key, reuse, read)
        ranks.agreed(DONE if done else "")
        return done or run()


def helped(key: str, compute: Callable[[], Result]) -> Result:
    """Compute this rank's share of a step that rank 0 logs; return at once if the step is done.

    An error ends the run that rank 0 has opened, since a killed rank 0 cannot.

    Args:
        key: Of the step.
        compute: Computes this rank's share.
    """
    if ranks.agreed("") == DONE:
        return Result({}, reused=True)
    try:
        return compute()
    except BaseException:
        with signals.held():
            store.ask(lambda: runs.end_stale("lsa.key", key), None)
        raise


def _finished(key: str, reuse: bool, read: Callable[[str], Result]) -> Result | None:
    """The finished step with this key; None where there is none to reuse."""
    waiting = spool.find(key, store.uri())
    if waiting and (run_id := sync.deliver(waiting)):
        return _present(read(run_id))
    # Anyway: to measure what is there already takes longer than to ask for it.
    every = store.ask(lambda: runs.every_finished(key), [], anyway=True) if reuse else []
    for done in every:
        try:
            return _present(read(done.run_id))
        except runs.Broken as error:
            log.warning("%s; it does not count", error)
    return None


def _present(done: Result) -> Result:
    """A finished step; of a training, with its checkpoint in the registry that is in use."""
    if done.probe != results.TRAIN:
        return done
    return replace(done, checkpoint=registry.present(done.run_id, done.checkpoint))


def step_tags(step: str, recipe: Recipe) -> dict[str, Any]:
    """Tags by which a step's run is found."""
    return {
        "lsa.step": step,
        "project": recipe.project,
        "optimizer": recipe.optimizer,
        "seed": recipe.seed,
    }
