"""Noise of the gradient during a training, from the probe set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lsa.landscape import Landscape, noise_scale

AGREEMENT = 1e-3  # relative, of |∇L|² from the products of samples with that of autograd
SHOWN = ("noise_scale", "noise_trace", "gradient_squared")  # of each block

Place = tuple[int, int]  # of a parameter in θ


class Noise:
    """Noise scale and diversity of the gradient on the probe set.

    From all pairs of per-sample gradients where one pass gives their products, as in a perceptron;
    else from the gradients of equal parts of the set.

    Args:
        places: Block → places of its parameters in θ; empty: only the whole gradient is measured.
    """

    def __init__(self, places: Mapping[str, Sequence[Place]]) -> None:
        self._places = places
        self._by_samples: bool | None = None  # whether products of samples are known; None: untried

    def measure(
        self, whole: Landscape, parts: Sequence[Landscape], theta: Tensor
    ) -> dict[str, float]:
        """Numbers; none where there are fewer than three parts, or parts of different size.

        Args:
            whole: L on the probe set.
            parts: L on parts of it.
            theta: Where.
        """
        grams = self._of_samples(whole, theta)
        size, n = 1, whole.n_samples
        if grams is None:
            sizes = {part.n_samples for part in parts}
            if len(parts) < 3 or len(sizes) != 1:
                return {}
            size = sizes.pop()
            n = len(parts) * size
            gradients = torch.stack([part.gradient(theta) for part in parts])
            if not self._places:
                grams = {(0, len(theta)): noise_scale.gram(gradients)}
            else:
                places = [place for block in self._places.values() for place in block]
                grams = {(a, b): noise_scale.gram(gradients[:, a:b]) for a, b in places}
        held = {place: gram.double().cpu() for place, gram in grams.items()}
        found = noise_scale.of_gram(sum_of(list(held.values())), size, n).numbers()
        for block, places in self._places.items():
            own = [gram for place, gram in held.items() if place in places]
            numbers = noise_scale.of_gram(sum_of(own), size, n).numbers() if own else {}
            found |= {f"{name}/{block}": numbers[name] for name in SHOWN if name in numbers}
        return found

    def _of_samples(self, whole: Landscape, theta: Tensor) -> dict[Place, Tensor] | None:
        """Products of per-sample gradients, if they are known; the first time they are checked."""
        if self._by_samples is False:
            return None
        grams = noise_scale.sample_grams(whole, theta)
        if self._by_samples is None:
            self._by_samples = grams is not None and _agrees(grams, whole.gradient(theta))
        return grams if self._by_samples else None


def sum_of(grams: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors of equal shape."""
    return torch.stack(list(grams)).sum(0)


def _agrees(grams: Mapping[Place, Tensor], gradient: Tensor) -> bool:
    """Whether the mean of the products of samples is |∇L|², part by part."""
    for (start, stop), gram in grams.items():
        wanted = float(gradient[start:stop].double().square().sum())
        scale = float(gram.diagonal().double().mean())
        if abs(float(gram.double().mean()) - wanted) > AGREEMENT * scale:
            return False
    return True
