"""Subsets of a data set: a stratified validation split, a random subsample, evenly spaced items."""

import numpy as np
from numpy.typing import NDArray

from interp_models.core.errors import InputError
from interp_models.core.rng import uniform

Indices = NDArray[np.int64]


def stratified_split(
    labels: Indices, indices: Indices, fraction: float, seed: int, keys: Indices | None = None
) -> tuple[Indices, Indices]:
    """Split `indices` into a rest and a part that holds `fraction` of each class (rounded), drawn by seed.

    A class never loses its last training image. What is drawn depends on seed and `keys`, one for each of `indices`:
    by default the indices themselves.
    """
    order = indices[np.argsort(uniform(seed, indices if keys is None else keys), kind="stable")]
    held_out: list[int] = []
    for label in np.unique(labels[indices]):
        members = order[labels[order] == label]
        held_out.extend(members[: min(round(fraction * len(members)), len(members) - 1)])
    part = np.sort(np.asarray(held_out, dtype=np.int64))
    return np.setdiff1d(indices, part), part


def subsample(indices: Indices, n: int | None, seed: int) -> Indices:
    """`n` of the indices drawn by seed, in order; all of them for None or when there are not more.

    Raises:
        InputError: for n below 1.
    """
    if n is not None and n < 1:
        raise InputError(f"n_images must be at least 1; got {n}")
    if n is None or n >= len(indices):
        return indices
    return np.sort(indices[np.argsort(uniform(seed, indices), kind="stable")][:n])


def spread(total: int, n: int) -> list[int]:
    """At most `n` numbers below `total`, spread evenly, the first and the last among them.

    >>> spread(10, 4)
    [0, 3, 6, 9]
    >>> spread(2, 8)
    [0, 1]
    """
    return [int(number) for number in np.unique(np.linspace(0, total - 1, n).round())]
