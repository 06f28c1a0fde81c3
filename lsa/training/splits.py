"""A dataset's images as two splits: divided, limited and normalised the same for everyone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsa.runtime.errors import InputError
from lsa.training.images import Split

HELD_OUT = 0.2  # of a dataset that has one split only
SEED = 0  # of every division and subset, so that they are the same for everyone
STD_FLOOR = 1.0  # one grey level of 8 bits: a constant channel must not divide by zero


def relabelled(label: str, parts: list[Split]) -> tuple[list[Split], int]:
    """Labels as 0 … classes − 1, by the classes of the first part, and their number.

    Raises:
        InputError: A class of the second part is not in the first.
    """
    known = parts[0].labels.unique()
    for split in parts[1:]:
        strange = split.labels[~torch.isin(split.labels, known)]
        if len(strange):
            raise InputError(
                f"{label}: the class {int(strange[0])} of the validation split has no training "
                "images; choose another dataset."
            )
    return [Split(x, torch.searchsorted(known, y)) for x, y in parts], len(known)


def _stratified(labels: Tensor) -> Tensor:
    """A fixed random order whose every beginning has the class proportions of the whole.

    The r-th of the m images of a class stands at the quantile (r − ½)/m: Webster's apportionment.
    """
    rng = torch.Generator().manual_seed(SEED)
    shuffled = torch.randperm(len(labels), generator=rng)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    quantile = (torch.arange(len(labels)) - starts + 0.5) / counts.repeat_interleave(counts)
    return grouped[quantile.argsort(stable=True)]


def divided(split: Split) -> tuple[Split, Split]:
    """Training and validation part of a dataset with one split, each in the original order."""
    order = _stratified(split.labels)
    held = math.ceil(HELD_OUT * len(order))
    val, train = order[:held].sort().values, order[held:].sort().values
    return _subset(split, train), _subset(split, val)


def limited(split: Split, option: str, limit: int | None) -> Split:
    """A fixed subset of a split, with classes in equal shares.

    Args:
        split: What is limited.
        option: Name of the limit, for messages.
        limit: Number of samples; None: all.

    Raises:
        InputError: A limit below 1 or beyond the split.
    """
    if limit is None:
        return split
    n = len(split.labels)
    if not isinstance(limit, int) or not 1 <= limit <= n:
        raise InputError(f"{option}={limit!r} is not among the split's sizes; choose 1 to {n}.")
    return _subset(split, _stratified(split.labels)[:limit].sort().values)


def _subset(split: Split, indices: Tensor) -> Split:
    return Split(split.images[indices], split.labels[indices])


def normalisation(
    label: str,
    images: Tensor,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, `(c, 1, 1)`, in grey levels from 0 to 255.

    Args:
        label: Of the dataset, for messages.
        images: `(n, c, h, w)`, uint8; measured if neither mean nor std is given.
        mean: A number, or one for each channel, of pixels scaled to [0, 1].
        std: The same.

    Raises:
        InputError: Not a number, or one for each channel; a std that is not positive.
    """
    if mean is None and std is None:
        return _channel_statistics(images)
    channels = images.shape[1]
    statistics = []
    for name, value in (("mean", mean), ("std", std)):
        given = value if isinstance(value, Sequence) else [value] * channels
        values = [v for v in given if isinstance(v, int | float) and math.isfinite(v)]
        if not len(values) == len(given) == channels or (name == "std" and min(values) <= 0):
            raise InputError(
                f"{label}: {name}={value!r} must be a number, or one for each of the {channels} "
                "channel(s), of pixels between 0 and 1, with std above 0; give both or neither."
            )
        statistics.append(255 * torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
    return statistics[0], statistics[1]


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, `(c, 1, 1)`, exact from a histogram."""
    levels = torch.arange(256, dtype=torch.float64)
    channels = [images[:, c].flatten().bincount(minlength=256) for c in range(images.shape[1])]
    weights = torch.stack(channels).double() / channels[0].sum()  # (c, 256)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]).square()).sum(1)
    std = variance.sqrt().clamp_min(STD_FLOOR)
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)
