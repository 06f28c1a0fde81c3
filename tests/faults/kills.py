"""Clients are killed at random moments: twenty times, or as often as LSA_KILLS says."""

from __future__ import annotations

import os
from pathlib import Path

import test_kill

from faults import Row

TIMES = int(os.environ.get("LSA_KILLS", "20"))


def rows(folder: Path) -> list[Row]:
    """The fault of this module: SIGKILL to a study of two workers."""
    folders = [test_kill.prepared(folder / name, epochs=60, seeds=2) for name in ("peace", "war")]
    hit = test_kill.kills_change_nothing(*folders, TIMES, seeds=2)
    return [
        Row(
            "client killed",
            "SIGKILL to a study, or to it and its workers, 0 to 3 s after its first step began",
            hit,
            "nothing: after the next start all numbers equal those of an undisturbed study, "
            "no duplicates",
            "the process ends; the next start continues, trainings after their last epoch",
        )
    ]
