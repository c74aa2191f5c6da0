"""Counter-based random numbers: each number is a pure function of its integer keys.

Numbers need not be drawn in order, so results do not depend on batch size, number of workers or ranks.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_keys(*keys: ArrayLike) -> NDArray[np.uint64]:
    """A hash of 64 bits for each combination of the integer keys, which broadcast like numpy arrays. Keys count
    modulo 2⁶⁴."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        whole = np.atleast_1d(np.asarray(key))
        if whole.dtype.kind != "i":  # more than 63 bits
            whole = (whole.astype(object) % 2**64).astype(np.uint64)
        key = whole.astype(np.int64).view(np.uint64)
        state = _mix(state + _GAMMA + _mix(key + _GAMMA))  # arrays overflow silently; scalars would warn
    return state.reshape(np.broadcast_shapes(*(np.shape(key) for key in keys)))


def uniform(*keys: ArrayLike) -> NDArray[np.float64]:
    """A uniform number in [0, 1) for each combination of the integer keys, which broadcast like numpy arrays.

    >>> float(uniform(0, 7)) == float(uniform(0, [6, 7])[1]) == float(uniform(2**64, 7))
    True
    """
    return (hash_keys(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_of(*keys: int) -> int:
    """A seed for `torch.manual_seed`, a pure function of the keys."""
    return int(hash_keys(*keys)) >> 1
