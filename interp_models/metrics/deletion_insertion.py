"""Curves of the score while cells are deleted or inserted in the map's order: DAUC, DC, IAUC and IC."""

from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.scoring import ScoreFn
from interp_models.metrics.base import METRICS, FaithfulnessMetric, Grid
from interp_models.metrics.perturbation import curve, exact, mean_of_groups, pearson, ranks, trapezoid

FLAT = 1e-6
"""A curve that spans less than this varies by float32 noise alone."""


@METRICS.register("deletion_insertion")
class DeletionInsertion(FaithfulnessMetric):
    """Cells of the grid are removed in the order of the map, the most important first; c_k is the score after step k.

    - `dauc`, deletion: the clean image goes black; area under c_k / max c over the fraction removed, lower is better
      (Petsiuk et al. 2018; tutorial equations 25 and 26);
    - `dc`, deletion correlation: Pearson of c_{k-1} - c_k and the mean saliency of the cells removed at step k,
      higher is better (Gomez et al. 2022);
    - `iauc`, insertion: the blurred image turns into the clean one; higher is better;
    - `ic`, insertion correlation: Pearson of c_k - c_{k-1} and the saliency of the cells shown; higher is better.

    Areas are undefined where the curve is 0 throughout, correlations where scores or saliency do not vary.
    With T steps, 2 T + 1 passes per image, the clean one included: both curves share it.
    """

    keys = ("dauc", "dc", "iauc", "ic")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"dauc": False, "dc": True, "iauc": True, "ic": True}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "dauc": "Area under the deletion curve: the mean score while places are removed, most salient first.",
        "dc": "Deletion correlation: of a place's saliency with the fall of the score when it is removed.",
        "iauc": "Area under the insertion curve: the mean score while places are put back, most salient first.",
        "ic": "Insertion correlation: of a place's saliency with the rise of the score when it is put back.",
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
        """Steps of the curve; deletion fills with black, insertion starts from the blurred image."""
        steps = len(self.preset.counts(grid[0] * grid[1], self.max_steps)) - 1
        return steps, "black" if key in ("dauc", "dc") else self.preset.blur_name


def _correlation(scores: Tensor, variation: Tensor, saliency: Tensor) -> Tensor:
    flat = exact(scores.amax(dim=1) - scores.amin(dim=1)) <= FLAT
    return torch.where(flat, torch.nan, pearson(variation, saliency))
