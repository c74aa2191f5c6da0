"""Deletion and insertion curves: DAUC, DC, IAUC and IC."""

from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.scoring import ScoreFn
from interp_models.metrics.base import METRICS, FaithfulnessMetric, Grid
from interp_models.metrics.perturbation import curve, exact, mean_of_groups, pearson, ranks, trapezoid

FLAT = 1e-6
"""A curve with a smaller range than this only shows float32 noise."""


@METRICS.register("deletion_insertion")
class DeletionInsertion(FaithfulnessMetric):
    """Deletion and insertion: the score c_k after step k, while cells are replaced in the order of their saliency.

    The most salient cells come first.

    - `dauc`, area under the deletion curve: cells of the clean image turn black. The area is that under c_k / max c
      over the fraction of removed cells. Lower is better (Petsiuk et al. 2018; tutorial, equations 25 and 26).
    - `dc`, deletion correlation: Pearson correlation of c_{k-1} - c_k and the mean saliency of the cells that are
      removed at step k. Higher is better (Gomez et al. 2022).
    - `iauc`, area under the insertion curve: cells of the blurred image turn clean. Higher is better.
    - `ic`, insertion correlation: Pearson correlation of c_k - c_{k-1} and the mean saliency of the cells that are
      shown at step k. Higher is better.

    Areas are in [0, 1], correlations in [-1, 1]. An area is undefined if its curve is 0 everywhere; a correlation is
    undefined if scores or saliency do not vary. T steps take 2 T + 1 passes per image; both curves share the clean one.
    See `FaithfulnessMetric` for the arguments.
    """

    keys = ("dauc", "dc", "iauc", "ic")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"dauc": False, "dc": True, "iauc": True, "ic": True}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "dauc": "Area under the deletion curve: the mean score while cells are removed, the most salient first.",
        "dc": "Deletion correlation: between a cell's saliency and the drop of the score when it is removed.",
        "iauc": "Area under the insertion curve: the mean score while cells are shown again, the most salient first.",
        "ic": "Insertion correlation: between a cell's saliency and the rise of the score when it is shown again.",
    }

    def _score(
        self, score_fn: ScoreFn, images: Tensor, maps: Tensor, target: Tensor, clean: Tensor
    ) -> dict[str, Tensor]:
        counts = self.preset.counts(maps[0].numel(), self.max_steps)
        order = ranks(maps)
        black = torch.zeros_like(images)
        deletion = curve(score_fn, images, black, order, counts[1:], target, self.batch)
        insertion = curve(score_fn, self.preset.blur(images), images, order, counts[:-1], target, self.batch)
        deletion = torch.cat([clean[:, None], deletion], dim=1)  # (B, T + 1)
        insertion = torch.cat([insertion, clean[:, None]], dim=1)
        saliency = mean_of_groups(maps.flatten(1).sort(dim=1, descending=True).values, counts)  # (B, T)
        return {
            "dauc": self._area(deletion, counts),
            "dc": _correlation(deletion, -deletion.diff(dim=1), saliency),
            "iauc": self._area(insertion, counts),
            "ic": _correlation(insertion, insertion.diff(dim=1), saliency),
        }

    def _area(self, scores: Tensor, counts: list[int]) -> Tensor:
        area = trapezoid(scores, [count / counts[-1] for count in counts])
        highest = exact(scores).amax(dim=1)
        if self.preset.divide_by_max:
            return area / highest.where(highest > 0, torch.nan)
        return area.where(highest > 0, torch.nan)

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The number of steps of the curve; the fill is black for deletion, and the blur for insertion."""
        steps = len(self.preset.counts(grid[0] * grid[1], self.max_steps)) - 1
        return steps, "black" if key in ("dauc", "dc") else self.preset.blur_name


def _correlation(scores: Tensor, variation: Tensor, saliency: Tensor) -> Tensor:
    flat = exact(scores.amax(dim=1) - scores.amin(dim=1)) <= FLAT
    return torch.where(flat, torch.nan, pearson(variation, saliency))
