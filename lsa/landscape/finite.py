"""The sample that makes a loss infinite or NaN."""

from __future__ import annotations

from torch import Tensor

from lsa.landscape.landscape import Landscape


def culprit(landscape: Landscape, theta: Tensor) -> str:
    """One line that names the first sample whose loss at θ `(d,)` is not finite.

    Empty where all losses are finite, or none is: then the checkpoint has diverged, or the loss
    knows no samples.
    """
    losses = landscape.losses(theta)
    bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
    if not bad or len(bad) == len(losses):
        return ""
    rest = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
    return (
        f"the loss of sample {bad[0]}{rest} out of {len(losses)} is {losses[bad[0]]:g} at this "
        "checkpoint; mend the sample's data or leave it out"
    )
