"""Descriptions of experiments, runs, models and versions, as MLflow's UI shows them."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from lsa.tracking import views
from lsa.tracking.headlines import unless_deleted
from lsa.tracking.registered import registered_name
from lsa.tracking.runs import Done
from lsa.tracking.store import client

PAGE = "workflowType=machine_learning"
TRAININGS = f"{PAGE}&searchFilter={quote(views.TRAININGS)}"
# Without a filter of its own: beside one the UI does not open the view.
PICTURES = f"{PAGE}&compareRunsMode=CHART&viewStateShareKey={views.KEY}"


def links(experiment: str, study: str) -> str:
    """Links to the report, the explorer and the list of trainings with all their numbers."""
    root = f"#/experiments/{experiment}"
    made = f"{root}/runs/{study}/artifacts"
    report = f"[Report]({made}/report.html) · [Explorer]({made}/explorer.html) · " if study else ""
    pictures = f"[Trainings in pictures]({root}/runs?{PICTURES}) · " if views.offered() else ""
    return f"{report}{pictures}[All trainings, to compare]({root}/runs?{TRAININGS})"


def of_project(experiment: str, study: str, text: str, numbers: Sequence[str]) -> None:
    """Set the description of an experiment, and of the run that holds its report; offer a view.

    Args:
        experiment: Its id.
        study: Id of the run with the report; "" for none.
        text: Markdown.
        numbers: Names of metrics of the trainings, which the view has as columns and pictures.
    """
    description = f"{text}\n\n{links(experiment, study)}"
    known = client().get_experiment(experiment)
    wanted = {MLFLOW_RUN_NOTE: description}
    if views.offered():
        wanted[views.TAG] = views.saved(numbers, known.creation_time or 0)
    for tag, value in wanted.items():
        if known.tags.get(tag) != value:
            client().set_experiment_tag(experiment, tag, value)
    if study:
        client().set_tag(study, MLFLOW_RUN_NOTE, description)


def of_training(training: Done, study: str, text: str) -> None:
    """Set the description of a training's run, its model and its version, if the text is new.

    Args:
        training: The finished training.
        study: Id of the run with the report; "" for none.
        text: Markdown.
    """
    description = f"{text}\n\n{links(training.experiment, study)}"
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


def of_model(project: str, optimizer: str, text: str) -> None:
    """Set the description, in Markdown, of the registered model of a project and optimizer."""
    name = registered_name(project, optimizer)
    unless_deleted(name, lambda: client().update_registered_model(name, description=text))
