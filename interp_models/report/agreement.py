"""How far explainers and metrics agree: Spearman correlations of maps on one image, and of metrics over explainers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from interp_models.metrics.perturbation import to_grid

SIDE = 14
"""Maps are compared on a grid of at most so many rows and columns."""
Floats = NDArray[np.float64]


def spearman(values: Floats) -> Floats:
    """Spearman's correlations (k, k) of the rows of values (k, n); NaN for a row that is constant or not finite.

    >>> spearman(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 9.0], [3.0, 2.0, 1.0]])).round(6).tolist()[0]
    [1.0, 1.0, -1.0]
    """
    from scipy import stats  # type: ignore[import-untyped]  # slow to import, and only needed here

    ranks = np.stack([stats.rankdata(row) for row in values]) if len(values) else values
    away = ranks - ranks.mean(axis=1, keepdims=True)
    away[~np.isfinite(values).all(axis=1)] = 0
    norms = np.linalg.norm(away, axis=1, keepdims=True)
    unit = np.divide(away, norms, out=np.full_like(away, np.nan), where=norms > 0)
    found: Floats = unit @ unit.T
    return found


def of_maps(maps: Sequence[NDArray[np.floating]]) -> Floats:
    """Spearman's correlations (k, k) of k maps (h, w) of one image, on the coarsest grid of all of them."""
    if not maps:
        return np.empty((0, 0))
    grid = (min(SIDE, *(len(own) for own in maps)), min(SIDE, *(own.shape[1] for own in maps)))
    each = [to_grid(torch.from_numpy(np.array(own, np.float32))[None], grid).flatten().numpy() for own in maps]
    return spearman(np.stack(each).astype(np.float64))


def of_metrics(values: Mapping[str, Mapping[str, float | None]], higher_is_better: Mapping[str, bool]) -> Floats:
    """Spearman's correlations (m, m) of m metrics over explainers; 1 means that both rank the explainers alike.

    Args:
        values: values by metric and explainer. Explainers without a value of every metric are left out.
        higher_is_better: direction of each metric.
    """
    names = list(next(iter(values.values()), {}))
    common = [name for name in names if all(_known(own.get(name)) for own in values.values())]
    signs = [1 if higher_is_better[key] else -1 for key in values]
    rows = [[sign * float(own[name] or 0) for name in common] for sign, own in zip(signs, values.values(), strict=True)]
    if len(common) < 3:
        return np.full((len(values), len(values)), np.nan)
    return spearman(np.array(rows))


def mean_of_pairs(correlations: Floats) -> float | None:
    """The mean over all pairs of different rows; None if no pair is defined."""
    pairs = correlations[np.triu_indices(len(correlations), 1)]
    pairs = pairs[np.isfinite(pairs)]
    return float(pairs.mean()) if len(pairs) else None


def _known(value: Any) -> bool:
    return value is not None and bool(np.isfinite(value))
