"""The saliency metric of Dabkowski and Gal: how small a crop the map finds, and how well it is classified."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case
from interp_models.metrics.regions import box_of_map, soft_masks

SMALLEST = 0.05
"""Smaller crops do not count as smaller."""


@METRICS.register("saliency_metric")
class SaliencyMetric(MapMetric):
    """`sm`, the saliency metric: log max(a, 0.05) - log p (Dabkowski and Gal, NeurIPS 2017, equation 9).

    a is the area of the box around the largest connected component of the map above its mean, as a fraction of the
    image. p is the target's probability for this part of the image, resized bicubically to the image's size. Lower is
    better: a small part, classified with certainty. An image takes one pass. See `MapMetric` for the arguments.
    """

    family = "localisation"
    keys = ("sm",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"sm": False}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "sm": "Saliency metric: the log area of the box around the map minus the log score of this crop."
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        height, width = case.images.shape[-2:]
        crops, areas = [], []
        for image, mask in zip(case.images, soft_masks(case).cpu().numpy(), strict=True):
            left, top, right, bottom = next(iter(box_of_map(mask)), (0, 0, width, height))
            crop = image[None, :, top:bottom, left:right]
            crops.append(F.interpolate(crop, size=(height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1))
            areas.append((right - left) * (bottom - top) / (height * width))
        score = case.scores(torch.stack(crops), self.batch).double().clamp(min=torch.finfo(torch.float32).tiny)
        area = torch.tensor(areas, dtype=score.dtype, device=score.device).clamp(min=SMALLEST)
        return {"sm": area.log() - score.log()}

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """No steps; the rest of the image is cut off."""
        return None, "cut off"
