"""How threads of OpenMP wait for each other: in lsa's processes they sleep.

GNU's OpenMP, with which torch divides its work, has a thread that waits keep its core busy for
milliseconds. Where other programs run as well, it takes the core from the thread that it waits for.
On two cores, one of which another program used, a Hessian product of a small network took three
times as long as with threads that sleep; with both in use, thirty times. A user who has set
OpenMP's own variables is left as he is.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

POLICY = "OMP_WAIT_POLICY"
SET = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # variables of OpenMP: who sets them has chosen


def sleep_while_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep, in this process and those that it starts.

    For the start of a program: OpenMP reads its variables when torch is loaded.
    """
    if not any(environment.get(name) for name in SET):
        environment[POLICY] = "PASSIVE"
