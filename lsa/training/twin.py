"""A copy of an optimizer in float64, which steps in place of the original."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def twin_of(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter]
) -> tuple[Optimizer, list[nn.Parameter]]:
    """A copy of an optimizer in float64 without hooks, and its copies of the parameters."""
    memo: dict[int, Any] = {}
    twin = object.__new__(type(optimizer))
    # Not deepcopy: torch drops all but state and groups. A scheduler hangs a step on the instance.
    content = {k: v for k, v in vars(optimizer).items() if k != "step" and "_hooks" not in k}
    vars(twin).update(copy.deepcopy(content, memo))
    vars(twin).update({k: OrderedDict() for k in vars(optimizer) if "_hooks" in k})
    for group in twin.param_groups:
        group |= {"fused": False} if group.get("fused") else {}
        for p in group["params"]:
            p.data, p.grad = p.data.double(), None
    for state in twin.state.values():
        state |= {key: _double(value) for key, value in state.items() if key != "step"}
    still = (nn.Parameter(p.detach().double()) for p in parameters if id(p) not in memo)
    return twin, [memo[id(p)] if id(p) in memo else next(still) for p in parameters]


def _double(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
