"""The view of a project's trainings that MLflow's Runs page offers under *Views*.

MLflow keeps a saved view as a tag of the experiment, and its UI since 3.17 lists it by name. There
is no public call for it. Older UIs keep views in another way, and end with an error where they
open this one: with an older MLflow there is no view.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

import mlflow

NAME = "Landscape"
KEY = "lsa"
TAG = f"mlflow.sharedViewState.{KEY}"
TRAININGS = "tags.`lsa.step` = 'train'"
# Across in every scatter plot; each other number has one in which it is up.
ACROSS = "lanczos/lambda_max"
COORDINATES = 4  # beside the optimizer: as many as can be read


SINCE = (3, 17)  # of MLflow


def offered() -> bool:
    """Whether the UI of the installed MLflow can open the view."""
    major, minor, *_ = re.findall(r"\d+", mlflow.__version__)
    return (int(major), int(minor)) >= SINCE


def saved(numbers: Sequence[str], created: int) -> str:
    """The tag's value: trainings with these numbers as columns, scatter plots, coordinates, bars.

    Args:
        numbers: Names of metrics on the trainings' runs.
        created: When, in milliseconds since 1970; the same again, so that nothing changes.
    """
    columns = [f"metrics.`{name}`" for name in numbers]
    state = {
        "searchFilter": TRAININGS,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*columns, "params.`optimizer`", "params.`seed`"],
        "compareRunCharts": _charts(numbers),
        "compareRunSections": [{"uuid": KEY, "name": NAME, "display": True, "isReordered": False}],
        "isAccordionReordered": True,  # the section stays above those that MLflow adds
        "runsHiddenMode": "SHOWALL",
    }
    # Packed as MLflow packs it: a tag has room for 5,000 characters.
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    times = {"createdAt": created, "updatedAt": created}
    return json.dumps({"name": NAME, **times, "state": f"deflate;{packed}"})


def _charts(numbers: Sequence[str]) -> list[dict[str, Any]]:
    charts: list[dict[str, Any]] = []
    if ACROSS in numbers:
        charts += [
            {"type": "SCATTER", "xaxis": _axis(ACROSS), "yaxis": _axis(name)}
            for name in numbers
            if name != ACROSS
        ]
    parallel = {"selectedParams": ["optimizer"], "selectedMetrics": [*numbers[:COORDINATES]]}
    charts.append({"type": "PARALLEL", **parallel, "showAllRuns": True})
    charts += [{"type": "BAR", "metricKey": name} for name in numbers if name == ACROSS]
    section = {"metricSectionId": KEY, "runsCountToCompare": 100, "isGenerated": False}
    return [{"uuid": f"{KEY}-{i}", "deleted": False, **section, **c} for i, c in enumerate(charts)]


def _axis(name: str) -> dict[str, str]:
    return {"key": name, "type": "METRIC"}
