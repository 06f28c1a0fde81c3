"""The store's client, which can be unplugged, and what the store then holds."""

from __future__ import annotations

from collections.abc import Callable

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from lsa import project
from lsa.project import Recipe
from lsa.studies import train
from lsa.tracking import spool, store

GONE = (
    "API request to http://host failed with exception Max retries: [Errno 111] Connection refused"
)


class Plug:
    """The store's client; without it, nothing answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = mlflow.MlflowClient
        self._before: Callable[[], None] = lambda: None
        self._after: Callable[[], None] = lambda: None
        monkeypatch.setattr(mlflow, "MlflowClient", self._client)
        monkeypatch.setattr(store, "_Client", self._client)
        monkeypatch.setattr(store, "PAUSE", 0.0)  # so that being there again is noticed at once

    def _client(self, *arguments: str, **named: str) -> Plugged:
        return Plugged(
            self._real(*arguments, **named), lambda: self._before(), lambda: self._after()
        )

    def pull(self) -> None:
        self._before = lambda: raises(MlflowException(GONE))

    def put(self) -> None:
        self._before = self._after = lambda: None

    def fail_at(self, call: int, *, answered: bool) -> None:
        """Answer so many calls, then none; the last is done, though nobody learns of it."""
        left = call

        def count() -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                self.pull()
                raises(MlflowException(GONE))

        self.put()
        if answered:
            self._before = count
        else:
            self._after = count


def trained_without(plug: Plug, said: str = "") -> Recipe:
    """Train the tiny project's sgd while the store is away; it is there again.

    Args:
        plug: Of the store.
        said: A pattern that the error matches.

    Returns:
        What was trained; the training waits in the spool.
    """
    recipe = project.load("tiny").recipe("sgd")
    store.client()
    plug.pull()
    with pytest.raises(spool.NotLogged, match=said):
        train.train(recipe)
    plug.put()
    return recipe


class Plugged:
    def __init__(self, real: object, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._real, self._before, self._after = real, before, after

    def __getattr__(self, name: str) -> Callable:
        method = getattr(self._real, name)

        def call(*arguments: object, **named: object) -> object:
            self._before()
            done = method(*arguments, **named)
            self._after()
            return done

        return call


def raises(error: Exception) -> None:
    raise error


def runs(**tags: str) -> list:
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return [r for r in found if tags.items() <= r.data.tags.items()]
