"""Training as a tracked step: every epoch logged, checkpoints kept, the last one registered."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lsa import project
from lsa.probe import Metric, Result
from lsa.project import Recipe
from lsa.project.factories import beside_the_user, permission
from lsa.runtime import files, modes, provenance
from lsa.runtime.errors import InputError
from lsa.studies import load, progress, steps
from lsa.studies.watched import Watched
from lsa.tracking import checkpoint as checkpoints
from lsa.tracking import recording, registered, registry, results, runs, serial, settings, store
from lsa.tracking.checkpoint import Checkpoint
from lsa.tracking.numbers import flat
from lsa.training import recipes
from lsa.training import train as training
from lsa.training.data import Data, Streams

KEPT = {"state", "history", "watched", "run"}  # of an interrupted run
SCRATCH = Path(".lsa")  # training states of runs that have not finished, in the working folder


@settings.restored()
@modes.usual()
def train(
    recipe: Recipe,
    *,
    device: str = "auto",
    reuse: bool = False,
    resume: bool = True,
    trusted: Collection[str] = (),
) -> Result:
    """Train by a recipe, log every epoch and register the final checkpoint.

    Args:
        recipe: From `Project.recipe`.
        device: Where to compute.
        reuse: Return a finished step with the same key instead of training again.
        resume: Go on from the last finished epoch of an interrupted run of the same step.
        trusted: Packages whose factories may be imported.

    Raises:
        InputError: The recipe is of a training elsewhere, or names what does not exist.
    """
    if recipe.origin:
        raise InputError(
            f"{recipe.project}.{recipe.optimizer} was trained elsewhere; choose an optimizer that "
            "lsa trains"
        )
    device_name = load.device_of(device)
    trusted = (*trusted, permission(recipe.dataset.name, recipe.dataset.options))
    split = checkpoints.load_data(recipe, device_name, trusted)
    # Wrong options fail here, before anything is tracked as running, and packages that are not
    # trusted before the key looks at their modules.
    training.initial(recipe, split, trusted)
    key = train_key(recipe, split.hash, device_name)
    return steps.once(
        key, lambda: _train(recipe, split, key, device_name, resume, trusted), reuse=reuse
    )


def _train(
    recipe: Recipe,
    split: Data | Streams,
    key: str,
    device_name: str,
    resume: bool,
    trusted: Collection[str],
) -> Result:
    name = steps.title("train", recipe)
    tags = steps.step_tags("train", recipe) | {"lsa.key": key, runs.FORM: project.form(recipe)}
    with (
        recording.run(
            name,
            experiment=recipe.project,
            tags=tags,
            device=device_name,
            deliver=registry.deliver,
        ) as opened,
        progress.bar(name) as report,
    ):
        opened.params(project.train_params(recipe))
        opened.json(recipe.model_dump(), "recipe.json")
        # Another store's training in this folder has a state of its own.
        state_file = SCRATCH / "training" / f"{store.step_name(key)}.safetensors"
        history, state, seen = _resumed(state_file, opened) if resume else ([], None, [])
        watched = Watched(
            recipe, split, trusted, lambda values, step: opened.metrics(values, step=step), seen
        )
        kept = store.ask(lambda: dict(registered.trajectory(key)), {})

        def checkpoint(state: Mapping[str, Any]) -> dict[str, Metric]:
            """Keep the checkpoint of a state, with its evaluation."""
            kept = _checkpoint(recipe, split, state, device_name, trusted)
            landscape = recipes.landscape_of(recipe, split, kept.model, trusted)
            metrics = training.final_metrics(recipes.held_out(landscape, split), landscape)
            final = kept.epoch == recipe.train.epochs
            registry.keep(opened, kept, flat(results.FINAL, metrics), key, final=final)
            return metrics

        def on_the_way(state: Mapping[str, Any]) -> None:
            """Keep a checkpoint of the trajectory, unless this training has logged it before."""
            if recipe.train.keeps(epoch := state["epoch"]) and epoch not in kept:
                checkpoint(state)

        on_the_way(training.initial(recipe, split, trusted))
        opened.attempt(registry.deliver)
        for epoch in training.train(
            recipe,
            split,
            device=device_name,
            trusted=trusted,
            state=state,
            report=report,
            watch=watched.attach,
        ):
            history.append(dict(epoch.metrics))
            opened.metrics(epoch.metrics, step=epoch.number)
            state = epoch.state
            if epoch.number < recipe.train.epochs:
                on_the_way(epoch.state)
            opened.attempt(registry.deliver)
            with files.replaced(state_file) as new:
                done = {"state": state, "history": history, "watched": watched.numbers}
                serial.save(done | {"run": opened.id}, new)
        assert state is not None  # of the last epoch, which an interrupted run may have trained
        metrics = checkpoint(state)
        opened.entry.keep()
        files.remove(state_file)
    address = opened.tag("lsa.checkpoint")
    return Result(metrics, probe=results.TRAIN, run_id=opened.id, checkpoint=address)


def _resumed(path: Path, opened: recording.Run) -> tuple[list[dict[str, float]], Any, list[Any]]:
    """The state that an interrupted run of the same step has left; its epochs are logged again.

    Returns:
        Metrics of the epochs, the state to go on from, and what was measured between steps.
    """
    if not path.exists():
        return [], None, []
    with contextlib.suppress(InputError):  # a damaged state only costs the epochs in it
        state = serial.load(path)
        if not (isinstance(state, dict) and state.keys() >= KEPT and _is_state(state["state"])):
            raise InputError(f"{path} is of another version")
        for number, metrics in enumerate(state["history"], 1):
            opened.metrics(metrics, step=number)
        opened.tags({"lsa.resumed_from": state["run"], "lsa.resumed_epoch": len(state["history"])})
        return state["history"], state["state"], state["watched"]
    return [], None, []


def _is_state(state: Any) -> bool:
    """Whether a training can go on from what a file holds."""
    return isinstance(state, dict) and state.keys() >= training.STATE


def _checkpoint(
    recipe: Recipe,
    split: Data | Streams,
    state: Mapping[str, Any],
    device: str,
    trusted: Collection[str],
) -> Checkpoint:
    """The checkpoint of a training's state."""
    return Checkpoint(
        recipe=recipe,
        epoch=state["epoch"],
        weights=state["model"],
        optimizer_state=state["optimizer"],
        data_hash=split.hash,
        versions=provenance.versions(),
        device=device,
        trusted=trusted,
    )


def train_key(recipe: Recipe, data_hash: str, device: str) -> str:
    """Key of a training's step. The modules of one's own that the recipe names are code of it.

    Args:
        recipe: Of the training.
        data_hash: Fingerprint of its data.
        device: Where it computes; numbers differ between devices.
    """
    content: dict[str, Any] = {"recipe": recipe.model_dump(), "data": data_hash, "device": device}
    if named := project.own_modules(recipe):
        with beside_the_user():
            content["own"] = {module: provenance.foreign_hash(module) for module in named}
    return steps.step_key("train", "lsa.training.train", content)
