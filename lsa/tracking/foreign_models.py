"""Weights of models that other code logged with MLflow's flavour pytorch."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from lsa.runtime.errors import InputError
from lsa.tracking.registered import missing
from lsa.training import foreign
from lsa.training.foreign import Foreign


def read(address: str) -> Foreign:
    """Read the weights of an MLflow model, without unpickling it.

    Args:
        address: `models:/name/version`, `runs:/id/name`, ….

    Raises:
        InputError: There is no such model, or its format is a pickle, which runs code.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = Path(download_artifacts(address, dst_path=scratch))
        except (MlflowException, OSError) as error:
            raise missing(address, error) from None
        for file in [*sorted(folder.glob("data/*.pt2")), *sorted(folder.glob("data/*.pth"))]:
            return foreign.read(file)
    raise InputError(
        f"{address} holds no torch model; give one that was logged with mlflow.pytorch.log_model"
    )
