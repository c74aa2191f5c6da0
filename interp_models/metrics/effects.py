"""Saliency against the effects of cells: monotonicity, IDSDS, sensitivity-n, infidelity and SaCo.

The effects of all but SaCo do not depend on the map: they are measured once for all explainers of the same images.
"""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.rng import uniform
from interp_models.core.scoring import ScoreFn
from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import exact, mean_of_groups, min_max, pearson, ranks, spearman, to_grid
from interp_models.metrics.regions import soft_masks

SIDE = 4
"""Rows and columns of IDSDS."""
SUBSETS, SIZES = 32, 8
"""Random subsets of each size, and number of sizes, of sensitivity-n."""
SQUARES = 64
"""Random squares of infidelity."""
GROUPS = 10
"""Groups of SaCo."""
EFFECT_FLAT = 1e-6
"""Effects with a smaller range than this only show float32 noise."""


def each_cell(rows: int, columns: int) -> Tensor:
    """Masks of single cells, (rows · columns, rows, columns) bool."""
    return torch.eye(rows * columns, dtype=torch.bool).view(-1, rows, columns)


def scores_without(metric: MapMetric, case: Case, what: str, cells: Tensor, score_fn: ScoreFn | None = None) -> Tensor:
    """The target's score (B, T) without some cells, (T, rows, columns) bool: measured once for all explainers.

    Args:
        metric: the metric, for its preset and batch size.
        case: the images.
        what: name of this choice of cells.
        cells: cells that are removed.
        score_fn: maps images to scores; None takes the probabilities.
    """
    fill, grid = metric.preset.removed(case.images), tuple(cells.shape[1:])
    name = f"without {what} of {grid}, {metric.preset.fill_name}"
    return case.once(name, lambda: case.without(fill, cells.to(case.images.device), metric.batch, score_fn))


def defined(effects: Tensor, values: Tensor) -> Tensor:
    """Values (B,), NaN where effects (B, T) do not vary."""
    flat = exact(effects.amax(dim=1) - effects.amin(dim=1)) <= EFFECT_FLAT
    return values.where(~flat.to(values.device), torch.nan)


@METRICS.register("monotonicity")
class Monotonicity(MapMetric):
    """`monotonicity`: Spearman correlation of each cell's saliency and the drop of the score when it alone is removed.

    In [-1, 1]; higher is better (Nguyen and Martínez 2020, with the drop itself, so that evidence against the class
    counts as such). Maps with more than `max_steps` cells are brought to a coarser square grid. It is undefined if no
    cell changes the score. One pass per cell, for all explainers together. See `MapMetric` for the arguments.
    """

    keys = ("monotonicity",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"monotonicity": True}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "monotonicity": "Rank correlation between a cell's saliency and the drop of the score without it."
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        rows, columns = self._grid((case.maps.shape[-2], case.maps.shape[-1]))
        scores = scores_without(self, case, "each", each_cell(rows, columns))
        drops = case.known_clean[:, None] - scores
        return {"monotonicity": defined(drops, spearman(to_grid(case.maps, (rows, columns)).flatten(1), drops))}

    def _grid(self, own: Grid) -> Grid:
        side = max(1, int(self.max_steps**0.5))
        return own if own[0] * own[1] <= self.max_steps else (min(own[0], side), min(own[1], side))

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The number of cells, and the preset's fill."""
        rows, columns = self._grid(grid)
        return rows * columns, self.preset.fill_name


@METRICS.register("idsds")
class SingleDeletion(MapMetric):
    """`idsds`, the in-domain single deletion score: Spearman correlation of the saliency in each of 4 × 4 cells and the
    drop of the target's logit when the cell is removed (Hesse et al., NeurIPS 2024).

    In [-1, 1]; higher is better. The paper's score is of a model that was trained further on images with removed cells,
    so that these lie in its domain; train such a model for scores like theirs. It is undefined if no cell changes the
    logit. 17 passes per image, for all explainers together. See `MapMetric` for the arguments.
    """

    needs = ("logit_fn",)
    keys = ("idsds",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"idsds": True}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "idsds": "Single deletion: rank correlation between the saliency of 4 x 4 cells and the drop of the logit "
        "without each."
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        none = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
        with case.watched():  # no perturbed image
            clean = scores_without(self, case, "none (logits)", none, case.logit_fn)
        drops = clean - scores_without(self, case, "each (logits)", each_cell(SIDE, SIDE), case.logit_fn)
        # Every pixel belongs to the cell that removes it, as in `without`.
        height, width = case.images.shape[-2:]
        y, x = torch.arange(height) * SIDE // height, torch.arange(width) * SIDE // width
        down, across = F.one_hot(y, SIDE).float(), F.one_hot(x, SIDE).float()
        down, across = down / down.sum(dim=0), across / across.sum(dim=0)
        saliency = down.T.to(case.maps) @ soft_masks(case) @ across.to(case.maps)
        return {"idsds": defined(drops, spearman(saliency.flatten(1), drops.flatten(1)))}

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """16 cells, and the preset's fill."""
        return SIDE**2, self.preset.fill_name


@METRICS.register("sensitivity_n")
class SensitivityN(MapMetric):
    """`sensitivity_n`: Pearson correlation, over random sets of n cells, of their summed saliency and the drop of the
    score without them, averaged over n (Ancona et al., ICLR 2018).

    There are 32 sets of each of up to 8 sizes n between 1 and 80 % of the cells, evenly spaced in log n. In [-1, 1];
    higher is better. It is undefined if no set changes the score. Up to 256 passes per image, for all explainers
    together. See `MapMetric` for the arguments.
    """

    keys = ("sensitivity_n",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"sensitivity_n": True}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "sensitivity_n": "Correlation between the summed saliency of random cells and the drop of the score without "
        "them."
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        rows, columns = case.maps.shape[-2:]
        sizes = _sizes(rows * columns)
        cells = torch.cat([_subsets(rows * columns, size) for size in sizes])
        scores = scores_without(self, case, "random sets", cells.view(-1, rows, columns))
        drops = exact(case.known_clean[:, None] - scores)
        sums = exact(min_max(case.maps).flatten(1)) @ exact(cells).T
        found = []
        for some, own in zip(*(torch.split(values, SUBSETS, dim=1) for values in (drops, sums)), strict=True):
            found.append(defined(some, pearson(own, some)))
        return {"sensitivity_n": torch.stack(found).nanmean(dim=0)}

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The number of sets, and the preset's fill."""
        return len(_sizes(grid[0] * grid[1])) * SUBSETS, self.preset.fill_name


def _sizes(cells: int) -> list[int]:
    """Up to `SIZES` numbers of cells between 1 and 80 % of all.

    >>> _sizes(49)
    [1, 2, 3, 5, 8, 14, 23, 39]
    """
    return sorted({round(size) for size in np.geomspace(1, max(1, 0.8 * cells), SIZES)})


def _subsets(cells: int, size: int) -> Tensor:
    """`SUBSETS` random sets of `size` cells, (SUBSETS, cells) bool; the same in every call."""
    draws = uniform(size, np.arange(SUBSETS)[:, None], np.arange(cells))
    return torch.as_tensor(draws.argsort(axis=1).argsort(axis=1) < size)


@METRICS.register("infidelity")
class Infidelity(MapMetric):
    """`infidelity`: mean over random squares S of (β Σ_S m - (f(x) - f(x without S)))², divided by the mean of the
    squared drop (Yeh et al., NeurIPS 2019, with square removal).

    m is the map, scaled to [0, 1]; β >= 0 is the scale with the lowest value, as maps have no unit. 64 squares have
    random sides up to half the grid, and random places. In [0, 1]; lower is better. 1 is the value of a map that says
    nothing. It is undefined if no square changes the score. 64 passes per image, for all explainers together. See
    `MapMetric` for the arguments.
    """

    keys = ("infidelity",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"infidelity": False}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "infidelity": "Squared error of the summed saliency as a prediction of the drop without random squares."
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        rows, columns = int(case.maps.shape[-2]), int(case.maps.shape[-1])
        cells = _squares(rows, columns)
        scores = scores_without(self, case, "random squares", cells)
        drops = exact(case.known_clean[:, None] - scores)
        sums = exact(min_max(case.maps).flatten(1)) @ exact(cells.flatten(1)).T
        scale = ((sums * drops).sum(dim=1) / sums.square().sum(dim=1).clamp(min=1e-30)).clamp(min=0)
        error = (scale[:, None] * sums - drops).square().mean(dim=1)
        whole = drops.square().mean(dim=1)
        return {"infidelity": torch.where(whole > EFFECT_FLAT**2, error / whole, torch.nan)}

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The number of squares, and the preset's fill."""
        return SQUARES, self.preset.fill_name


def _squares(rows: int, columns: int) -> Tensor:
    """`SQUARES` random squares of cells, (SQUARES, rows, columns) bool; the same in every call."""
    largest = max(1, min(rows, columns) // 2)
    draws = uniform(0, np.arange(SQUARES)[:, None], np.arange(3))
    side = 1 + (draws[:, 0] * largest).astype(int)
    top, left = (draws[:, 1] * (rows - side + 1)).astype(int), (draws[:, 2] * (columns - side + 1)).astype(int)
    y, x = np.arange(rows)[:, None], np.arange(columns)
    inside = (y >= top[:, None, None]) & (y < (top + side)[:, None, None])
    return torch.as_tensor(inside & (x >= left[:, None, None]) & (x < (left + side)[:, None, None]))


@METRICS.register("saco")
class SaCo(MapMetric):
    """`saco`, the salience-guided faithfulness coefficient: Σ_{i<j} w_ij / Σ_{i<j} |w_ij| (Wu et al., CVPR 2024).

    The cells, the most salient first, make 10 groups of (nearly) equal size. s_i is the summed saliency of group i, d_i
    the drop of the score when it alone is replaced by the image's mean colour. w_ij is s_i - s_j if d_i >= d_j, and
    s_j - s_i otherwise.

    In [-1, 1]; higher is better. It is undefined if no group changes the score. 10 passes per image. See `MapMetric`
    for the arguments.
    """

    keys = ("saco",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"saco": True}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "saco": "Whether groups of cells with more saliency also change the score more, weighted by the difference."
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        counts = _groups(case.maps[0].numel())
        mean = case.images.mean(dim=(2, 3), keepdim=True).expand_as(case.images)
        scores = case.steps(case.images, mean, ranks(case.maps), counts[:-1], counts[1:], self.batch)
        drops = exact(case.known_clean[:, None] - scores)
        groups = mean_of_groups(min_max(case.maps).flatten(1).sort(dim=1, descending=True).values, counts)
        sums = groups * torch.as_tensor(counts).diff()
        i, j = torch.triu_indices(len(counts) - 1, len(counts) - 1, offset=1)
        apart = sums[:, i] - sums[:, j]
        signed = torch.where(drops[:, i] >= drops[:, j], apart, -apart)
        whole = apart.abs().sum(dim=1)
        return {"saco": defined(drops, torch.where(whole > 0, signed.sum(dim=1) / whole, torch.nan))}

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The number of groups; removed cells have the image's mean colour."""
        return len(_groups(grid[0] * grid[1])) - 1, "image mean"


def _groups(cells: int) -> list[int]:
    """Numbers of cells before each group and after the last one.

    >>> _groups(12)
    [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]
    """
    groups = min(GROUPS, cells)
    return [round(group * cells / groups) for group in range(groups + 1)]
