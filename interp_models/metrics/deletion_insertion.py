"""Deletion and insertion curves: DAUC, DC, IAUC and IC."""

from typing import ClassVar

import torch
from torch import Tensor

from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import exact, mean_of_groups, pearson, ranks, trapezoid

FLAT = 1e-6
"""A curve with a smaller range than this only shows float32 noise."""


@METRICS.register("deletion_insertion")
class DeletionInsertion(MapMetric):
    """Deletion and insertion: the score c_k after step k, while cells are replaced in the order of their saliency.

    The most salient cells come first.

    - `dauc`, area under the deletion curve: cells of the clean image turn black, or into the preset's fill. The area is
      that under c_k / max c over the fraction of removed cells. Lower is better (Petsiuk et al. 2018; tutorial,
      equations 25 and 26).
    - `dc`, deletion correlation: Pearson correlation of c_{k-1} - c_k and the mean saliency of the cells that are
      removed at step k. Higher is better (Gomez et al. 2022).
    - `iauc`, area under the insertion curve: cells of the blurred image turn clean. Higher is better.
    - `ic`, insertion correlation: Pearson correlation of c_k - c_{k-1} and the mean saliency of the cells that are
      shown at step k. Higher is better.
    - `lerf`: as `dauc`, but the least salient cells turn black first. Higher is better (Samek et al. 2017).
    - `abpc`: `lerf` - `dauc`, the area between both curves. Higher is better (Schulz et al., ICLR 2020).

    Areas are in [0, 1], correlations in [-1, 1]. An area is undefined if its curve is 0 everywhere; a correlation is
    undefined if scores or saliency do not vary. T steps take T passes per image and curve, and one for the clean image.
    Deletion, insertion and the order of least saliency are one curve each; only those of wanted keys are computed.
    See `MapMetric` for the arguments.
    """

    keys = ("dauc", "dc", "iauc", "ic", "lerf", "abpc")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {
        "dauc": False, "dc": True, "iauc": True, "ic": True, "lerf": True, "abpc": True,
    }  # fmt: skip
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "dauc": "Area under the deletion curve: the mean score while cells are removed, the most salient first.",
        "dc": "Deletion correlation: between a cell's saliency and the drop of the score when it is removed.",
        "iauc": "Area under the insertion curve: the mean score while cells are shown again, the most salient first.",
        "ic": "Insertion correlation: between a cell's saliency and the rise of the score when it is shown again.",
        "lerf": "Area under the deletion curve when the least salient cells are removed first.",
        "abpc": "Area between the deletion curves of both orders: LeRF minus DAUC.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        images, clean = case.images, case.known_clean[:, None]
        maps = self.ordered(case)
        counts = self.preset.counts(maps[0].numel(), self.max_steps)
        order = ranks(maps)
        black = self.preset.removed(images).expand_as(images)
        saliency = mean_of_groups(maps.flatten(1).sort(dim=1, descending=True).values, counts)  # (B, T)
        fractions = [count / counts[-1] for count in counts]
        values: dict[str, Tensor] = {}
        if self.wants("dauc", "dc", "abpc"):
            with case.watched("dauc", "dc", "abpc"):
                deletion = case.curve(images, black, order, counts[1:], self.batch)
            deletion = torch.cat([clean, deletion], dim=1)  # (B, T + 1)
            case.keep_curve("dauc", fractions, deletion)
            values |= {
                "dauc": self._area(deletion, fractions),
                "dc": correlation(deletion, -deletion.diff(dim=1), saliency),
            }
        if self.wants("iauc", "ic"):
            with case.watched("iauc", "ic"):
                insertion = case.curve(self.preset.blur(images), images, order, counts[:-1], self.batch)
            insertion = torch.cat([insertion, clean], dim=1)
            case.keep_curve("iauc", fractions, insertion)
            values |= {
                "iauc": self._area(insertion, fractions),
                "ic": correlation(insertion, insertion.diff(dim=1), saliency),
            }
        if self.wants("lerf", "abpc"):
            with case.watched("lerf", "abpc"):
                reverse = case.curve(images, black, ranks(-maps), counts[1:], self.batch)
            reverse = torch.cat([clean, reverse], dim=1)
            case.keep_curve("lerf", fractions, reverse)
            values["lerf"] = self._area(reverse, fractions)
        if self.wants("abpc"):
            values["abpc"] = values["lerf"] - values["dauc"]
        return values

    def _area(self, scores: Tensor, fractions: list[float]) -> Tensor:
        area = trapezoid(scores, fractions)
        highest = exact(scores).amax(dim=1)
        if self.preset.divide_by_max:
            return area / highest.where(highest > 0, torch.nan)
        return area.where(highest > 0, torch.nan)

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The number of steps of the curve; the fill is black for deletion, and the blur for insertion."""
        return self.steps(grid), self.preset.blur_name if key in ("iauc", "ic") else self.preset.fill_name


def correlation(scores: Tensor, variation: Tensor, saliency: Tensor) -> Tensor:
    """Pearson correlation (B,) of the variations of scores and saliency (B, T); NaN if the scores (B, ...) are flat."""
    flat = exact(scores.amax(dim=1) - scores.amin(dim=1)) <= FLAT
    return torch.where(flat, torch.nan, pearson(variation, saliency))
