"""How long threads of OpenMP that wait keep their cores busy, before they sleep.

GNU's OpenMP, with which torch divides its work, has a waiting thread look 300,000 times whether the
work has come, for milliseconds. Where other programs run as well, it takes the core from the thread
that it waits for.

On two cores, beside one other program, a Hessian product of a small mlp took 13 to 16 ms, and 8 to
10 ms with 3,000 looks. Beside two other programs it took 10 to 224 ms, and 8 to 9 ms. On an idle
machine 3,000 looks took as long as 300,000. 1,000 took a tenth longer, and none took half as long
again. Where the user has set one of OpenMP's variables, it stays.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

LOOKS = "GOMP_SPINCOUNT"
OTHERS = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # variables that say the same


def sleep_soon(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep soon, in this process and those that it starts.

    For the start of a program: OpenMP reads its variables when torch is loaded.
    """
    if not any(environment.get(name) for name in (LOOKS, *OTHERS)):
        environment[LOOKS] = "3000"
