"""The step of sharpness-aware minimisation, plain or relative to each weight."""

from __future__ import annotations

from torch import Tensor

from lsa.landscape.landscape import Landscape
from lsa.maths.ascent import dot, length


def ascent(slope: Tensor, radius: float) -> Tensor | None:
    """e = ρ s/|s| `(d,)` for the slope s = T∇L; None where it is 0 and has no direction.

    The step in θ is ε = T e: T = 1 in SAM (Foret et al. 2021, §2), diag|θ| in ASAM (Kwon et al.
    2021, §4).
    """
    steepness = length(slope)
    return slope * (radius / steepness) if steepness > 0 else None


def turning(
    landscape: Landscape, theta: Tensor, scale: Tensor, radius: float, step: Tensor
) -> Tensor:
    """Influence `(N,)` of each sample on SAM's rise, as far as it turns the step e.

    e = ρu with u = Tg/|Tg|, so de = ρ (I − uuᵀ) T dg/|Tg|, and the rise changes by ∇L(θ + Te)·T de.

    Args:
        landscape: L.
        theta: θ.
        scale: `(d,)` diagonal of T.
        radius: ρ.
        step: From `ascent`.
    """
    steepness = length(scale * landscape.gradient(theta))
    slope = scale * landscape.gradient(theta + scale * step)
    u = step / radius
    across = slope - u * dot(u, slope)
    slopes = landscape.slopes(theta, radius / steepness * scale * across)
    return landscape.influences(slopes).double()
