"""Noise of the gradient during a training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lsa.landscape import Landscape, noise_scale


def of_probe_set(parts: list[Landscape], theta: Tensor) -> Mapping[str, float]:
    """Noise scale and diversity from the gradients of equal parts of the probe set.

    Nothing where there are fewer than three parts, or parts of different size.
    """
    sizes = {part.n_samples for part in parts}
    if len(parts) < 3 or len(sizes) != 1:
        return {}
    return noise_scale.of_batches(parts, theta, len(parts) * sizes.pop()).numbers()
