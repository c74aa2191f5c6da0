"""Subsets of a data set: a stratified split, a random subsample, evenly spread items."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from interp_models.core.errors import InputError
from interp_models.core.rng import uniform

Indices = NDArray[np.int64]


def stratified_split(
    labels: Indices, indices: Indices, fraction: float, seed: int, keys: Indices | None = None
) -> tuple[Indices, Indices]:
    """Split `indices` into two parts, stratified by class.

    Args:
        labels: class of every image of the data set.
        indices: the images to split.
        fraction: fraction of each class in the second part, rounded; at least one image of a class stays in the first.
        seed: seed of the draw.
        keys: an integer for each of `indices` that determines its draw; None takes the indices.

    Returns:
        The first part and the second part, both ascending.
    """
    order = indices[np.argsort(uniform(seed, indices if keys is None else keys), kind="stable")]
    held_out: list[int] = []
    for label in np.unique(labels[indices]):
        members = order[labels[order] == label]
        held_out.extend(members[: min(round(fraction * len(members)), len(members) - 1)])
    part = np.sort(np.asarray(held_out, dtype=np.int64))
    return np.setdiff1d(indices, part), part


def strata(labels: Sequence[Sequence[int]], indices: Indices) -> Indices:
    """One class for each image of a data set with several labels, to split it by.

    It is the rarest of the image's labels among the images `indices`; of equally rare ones, the first. An image
    without a label has -1. So images with one label each are split as those of a data set with single classes.

    Args:
        labels: the labels of every image of the data set.
        indices: the images to split.

    >>> strata([(0, 1), (0,), (), (1, 0), (0,)], np.arange(5)).tolist()
    [1, 0, -1, 1, 0]
    """
    counts = Counter(label for index in indices.tolist() for label in labels[index])
    rarest = [min(own, key=lambda label: (counts[label], label), default=-1) for own in labels]
    return np.asarray(rarest, dtype=np.int64)


def subsample(indices: Indices, n: int | None, seed: int) -> Indices:
    """Draw `n` of the indices by `seed`, ascending; None, or an `n` that is too large, returns all of them.

    Raises:
        InputError: if `n` is below 1.
    """
    if n is not None and n < 1:
        raise InputError(f"n_images must be at least 1; got {n}")
    if n is None or n >= len(indices):
        return indices
    return np.sort(indices[np.argsort(uniform(seed, indices), kind="stable")][:n])


def spread(total: int, n: int) -> list[int]:
    """At most `n` evenly spread numbers from 0 to `total` - 1, with both ends.

    >>> spread(10, 4)
    [0, 3, 6, 9]
    >>> spread(2, 8)
    [0, 1]
    """
    return [int(number) for number in np.unique(np.linspace(0, total - 1, n).round())]
