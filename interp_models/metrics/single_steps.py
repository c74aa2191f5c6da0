"""Deletion and insertion of one step at a time: DC and IC without accumulation."""

from typing import ClassVar

import torch
from torch import Tensor

from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case
from interp_models.metrics.deletion_insertion import correlation
from interp_models.metrics.perturbation import mean_of_groups, ranks


@METRICS.register("single_steps")
class SingleSteps(MapMetric):
    """Deletion and insertion correlation with the cells of one step only: earlier steps are undone (Gomez et al. 2022;
    saliency-maps-metrics with cumulative=False).

    - `dc_single`: Pearson correlation of c_0 - c_k and the mean saliency of the cells of step k. c_0 is the score of
      the clean image, c_k that without these cells.
    - `ic_single`: the same of c_k - c_0, where c_0 is the score of the blurred image, and c_k that with these cells
      clean.

    Both are in [-1, 1]; higher is better. They are undefined where `dc` and `ic` are. T steps take T passes per image
    for deletion, and T + 1 for insertion. See `MapMetric` for the arguments.
    """

    keys = ("dc_single", "ic_single")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"dc_single": True, "ic_single": True}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "dc_single": "Correlation between a cell's saliency and the drop of the score when it alone is removed.",
        "ic_single": "Correlation between a cell's saliency and the rise of the score when it alone is shown.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        images, maps = case.images, self.ordered(case)
        counts = self.preset.counts(maps[0].numel(), self.max_steps)
        order, saliency = ranks(maps), mean_of_groups(maps.flatten(1).sort(dim=1, descending=True).values, counts)

        def of(start: Tensor, end: Tensor, first: Tensor, sign: int) -> Tensor:
            scores = case.steps(start, end, order, counts[:-1], counts[1:], self.batch)  # (B, T)
            both = torch.cat([first[:, None], scores], dim=1)
            return correlation(both, sign * (scores - first[:, None]), saliency)

        values: dict[str, Tensor] = {}
        if self.wants("dc_single"):
            with case.watched("dc_single"):
                values["dc_single"] = of(images, self.preset.removed(images).expand_as(images), case.known_clean, -1)
        if self.wants("ic_single"):
            blurred = self.preset.blur(images)
            name = f"score of the image with {self.preset.blur_name}"
            with case.watched("ic_single"):
                values["ic_single"] = of(blurred, images, case.once(name, lambda: case.scores(blurred, self.batch)), 1)
        return values

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The number of steps; the fill is the preset's for deletion, and the blur for insertion."""
        return self.steps(grid), self.preset.blur_name if key == "ic_single" else self.preset.fill_name
