"""Noise of the gradient during a training."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lsa.landscape import Landscape, noise_scale
from lsa.landscape.noise_scale import NoiseScale


def of_probe_set(parts: list[Landscape], theta: Tensor) -> Mapping[str, float]:
    """Noise scale and diversity from the gradients of equal parts of the probe set.

    Nothing where there are fewer than three parts, or parts of different size.
    """
    sizes = {part.n_samples for part in parts}
    if len(parts) < 3 or len(sizes) != 1:
        return {}
    return numbers(noise_scale.of_batches(parts, theta, len(parts) * sizes.pop()))


def numbers(found: NoiseScale) -> Mapping[str, float]:
    """Name → value, with the standard errors of the draw; a scale that is not told is left out."""
    named = {
        "noise_trace": found.trace,
        "gradient_squared": found.gradient_squared,
        "noise_scale": found.scale,
        "gradient_diversity": found.diversity,
    }
    values = {name: estimate.value for name, estimate in named.items()}
    values |= {f"{name}_se_data": estimate.error for name, estimate in named.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
