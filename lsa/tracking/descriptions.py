"""Descriptions of experiments, runs, models and versions, as MLflow's UI shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import quote

from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from lsa.tracking import views
from lsa.tracking.headlines import unless_deleted
from lsa.tracking.registered import registered_name
from lsa.tracking.registry import ON_THE_WAY
from lsa.tracking.runs import Done
from lsa.tracking.store import client

COLOUR = "mlflow.runColor"  # of a run in the UI's charts
MOST = 5000  # characters that MLflow takes for every kind of description

PAGE = "workflowType=machine_learning"
TRAININGS = f"{PAGE}&searchFilter={quote(views.TRAININGS)}"
# Without a filter of its own: beside one the UI does not open the view.
PICTURES = f"{PAGE}&compareRunsMode=CHART&viewStateShareKey={views.KEY}"


def links(experiments: Sequence[str], study: str) -> str:
    """Links to the report, the explorer and the list of trainings with all their numbers.

    Args:
        experiments: Ids of the one whose pages are meant, and of others with trainings of the
            project, such as those that `mlflow run` has put into `Default`.
        study: Id of the run with the report; "" for none.
    """
    experiment = experiments[0]
    root = f"#/experiments/{experiment}"
    made = f"{root}/runs/{study}/artifacts"
    report = f"[Report]({made}/report.html) · [Explorer]({made}/explorer.html) · " if study else ""
    pictures = f"[Trainings in pictures]({root}/runs?{PICTURES}) · " if views.offered() else ""
    several = quote(json.dumps(list(experiments), separators=(",", ":")))
    together = f"#/compare-experiments/s?experiments={several}&{TRAININGS}"
    trainings = together if experiments[1:] else f"{root}/runs?{TRAININGS}"
    return f"{report}{pictures}[All trainings, to compare]({trainings})"


def _whole(text: str, links: str) -> str:
    """A text and its links; of a text too long for MLflow the first lines, such as rows."""
    room = MOST - len(links) - 10
    if len(text) > room:
        start = text[:room]
        text = (start.rpartition("\n")[0] or start) + "\n\n…"
    return f"{text}\n\n{links}"


def of_project(experiments: Sequence[str], study: str, text: str, numbers: Sequence[str]) -> None:
    """Set the description of an experiment, and of the run that holds its report; offer a view.

    Args:
        experiments: Its id, and those of others with trainings of the project.
        study: Id of the run with the report; "" for none.
        text: Markdown.
        numbers: Names of metrics of the trainings, which the view has as columns and pictures.
    """
    experiment, description = experiments[0], _whole(text, links(experiments, study))
    known = client().get_experiment(experiment)
    wanted = {MLFLOW_RUN_NOTE: description}
    if views.offered():
        wanted[views.TAG] = views.saved(numbers, known.creation_time or 0)
    for tag, value in wanted.items():
        if known.tags.get(tag) != value:
            client().set_experiment_tag(experiment, tag, value)
    if study:
        client().set_tag(study, MLFLOW_RUN_NOTE, description)
    _of_earlier(experiment, known.name)


def _of_earlier(experiment: str, name: str) -> None:
    """Set the description of the experiment that holds the checkpoints on the way, if there is one.

    Args:
        experiment: Id of the project's.
        name: Of the project's.
    """
    earlier = client().get_experiment_by_name(name + ON_THE_WAY)
    text = (
        f"Checkpoints of {name} that trainings kept before their last epoch, for curves during "
        f"training. The last ones, and all numbers, are in [{name}](#/experiments/{experiment})."
    )
    if earlier and earlier.tags.get(MLFLOW_RUN_NOTE) != text:
        client().set_experiment_tag(earlier.experiment_id, MLFLOW_RUN_NOTE, text)


def of_training(
    training: Done, experiments: Sequence[str], study: str, text: str, colour: str
) -> None:
    """Set the description of a training's run, its model and its version, if the text is new.

    Args:
        training: The finished training.
        experiments: Ids of its own and of others with trainings of the project.
        study: Id of the run with the report; "" for none.
        text: Markdown.
        colour: Of the run in charts, unless somebody has chosen one.
    """
    description = _whole(text, links(experiments, study))
    if COLOUR not in training.tags:
        unless_deleted(training.run_id, lambda: client().set_tag(training.run_id, COLOUR, colour))
    if training.tags.get(MLFLOW_RUN_NOTE) == description:
        return
    address = training.tags.get("lsa.checkpoint", "")
    model_id = training.tags.get("lsa.model_id", "")

    def write() -> None:
        client().set_tag(training.run_id, MLFLOW_RUN_NOTE, description)
        if model_id:
            client().set_logged_model_tags(model_id, {MLFLOW_RUN_NOTE: description})
        if address:
            name, _, version = address.removeprefix("models:/").rpartition("/")
            client().update_model_version(name, version, description=description)

    unless_deleted(training.run_id, write)


def of_model(
    project: str, optimizer: str, experiments: Sequence[str], study: str, text: str
) -> None:
    """Set the description of the registered model of a project and optimizer.

    Args:
        project: Its name.
        optimizer: Its name.
        experiments: Ids of its trainings' and of others with trainings of the project.
        study: Id of the run with the report; "" for none.
        text: Markdown.
    """
    name, description = registered_name(project, optimizer), _whole(text, links(experiments, study))
    unless_deleted(name, lambda: client().update_registered_model(name, description=description))
