"""Localisation by masks: overlap, energy and edges of the map with the object's mask."""

from typing import ClassVar

import torch
from torch import Tensor

from interp_models.metrics.base import METRICS, UnchangedImages
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import to_grid
from interp_models.metrics.regions import share_of, slopes, soft_masks, top_pixels

TOP = 0.1
"""Fraction of the pixels that count as the most salient ones."""
REACH = 15 / 224
"""Pixels this near to a key point belong to the part, as a fraction of the image's shorter side."""


@METRICS.register("mask_localisation")
class MaskLocalisation(UnchangedImages):
    """How well a map finds the object, by its mask g. The map m is upsampled to the image and scaled to [0, 1].

    - `iou`: intersection over union of {m > 0.5} and g; `dice`: twice the intersection over the sum of both areas.
    - `mask_energy`: Σ m g / Σ m, the fraction of the map's sum inside the object.
    - `energy_outside`: 1 - `mask_energy`, what spills into the background. Lower is better.
    - `mask_relevance`: the fraction of the most salient 10 % of the pixels that lie inside (as in CaBRNet).
    - `object_coverage`: the fraction of the object that the most salient pixels cover, if there are as many of them as
      the object has.
    - `edges`: cosine of the map's gradient and that of the object, Σ ∇m·∇g' / (‖∇m‖ ‖∇g'‖), in [-1, 1]. g' is the mask
      on the map's grid, upsampled like the map. 1 for a map of the object, -1 for one of the background.

    All but `edges` are in [0, 1], and all but `energy_outside` are better if higher. Of equal pixels at the limit each
    counts with equal weight. Values are undefined for an image without a mask. No pass of the model. See `MapMetric`
    for the arguments.
    """

    family = "localisation"
    needs = ("mask",)
    keys = ("iou", "dice", "mask_energy", "energy_outside", "mask_relevance", "object_coverage", "edges")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {
        "iou": True, "dice": True, "mask_energy": True, "energy_outside": False, "mask_relevance": True,
        "object_coverage": True, "edges": True,
    }  # fmt: skip
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "iou": "Intersection over union of the salient half of the map's range and the object's mask.",
        "dice": "Dice score of the salient half of the map's range and the object's mask.",
        "mask_energy": "The fraction of the map's sum that lies inside the object.",
        "energy_outside": "The fraction of the map's sum that lies outside the object.",
        "mask_relevance": "The fraction of the most salient tenth of the pixels that lies inside the object.",
        "object_coverage": "The fraction of the object that the most salient pixels cover, as many as it has.",
        "edges": "Edges of the map against edges of the object: the cosine of their gradients.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        mask = case.truth.mask
        assert mask is not None
        known = mask.any(dim=(1, 2))
        soft, area = soft_masks(case), mask.sum(dim=(1, 2)).clamp(min=1)
        half = soft > 0.5
        common, half_area = (half & mask).sum(dim=(1, 2)), half.sum(dim=(1, 2))
        energy = share_of((soft * mask).sum(dim=(1, 2)), soft.sum(dim=(1, 2)))
        top = torch.full_like(area, max(1, round(TOP * mask[0].numel())))
        values = {
            "iou": common / (half_area + area - common),
            "dice": 2 * common / (half_area + area),
            "mask_energy": energy,
            "energy_outside": 1 - energy,
            "mask_relevance": (top_pixels(soft, top) * mask).sum(dim=(1, 2)) / top,
            "object_coverage": (top_pixels(soft, area) * mask).sum(dim=(1, 2)) / area,
            "edges": edges(case, soft),
        }
        return {key: value.where(known, torch.nan) for key, value in values.items()}


def edges(case: Case, soft: Tensor) -> Tensor:
    """`edges` (B,) of the maps of a case, given as soft masks (B, H, W), too; NaN if the object fills the image."""
    assert case.truth.mask is not None
    grid = (case.maps.shape[-2], case.maps.shape[-1])
    coarse = to_grid(case.truth.mask.float(), grid)
    size = case.size
    ours, theirs = slopes(soft).flatten(1), slopes(to_grid(coarse, size)).flatten(1)
    return share_of((ours * theirs).sum(dim=1), ours.norm(dim=1) * theirs.norm(dim=1)).clamp(-1, 1)


@METRICS.register("part_relevance")
class PartRelevance(UnchangedImages):
    """`part_relevance`: the fraction of the most salient 10 % of the pixels that lie near a visible part.

    Near are 15/224 of the image's shorter side. The map is upsampled to the image. Higher is better; undefined for an
    image without a visible part. No pass of the model. See `MapMetric` for the arguments.
    """

    family = "localisation"
    needs = ("parts",)
    keys = ("part_relevance",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"part_relevance": True}
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "part_relevance": "The fraction of the most salient tenth of the pixels that lies near a part of the object."
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        parts, visible = case.truth.parts, case.truth.visible
        assert parts is not None
        assert visible is not None
        soft = soft_masks(case)
        y, x = (torch.arange(n, device=parts.device) + 0.5 for n in soft.shape[-2:])
        away = (y[:, None] - parts[..., 1, None, None]).square() + (x - parts[..., 0, None, None]).square()
        near = (away <= (REACH * min(soft.shape[-2:])) ** 2) & visible[..., None, None]  # (B, J, H, W)
        top = max(1, round(TOP * soft[0].numel()))
        chosen = top_pixels(soft, torch.full((len(soft),), top, device=soft.device))
        found = (chosen * near.any(dim=1)).sum(dim=(1, 2)) / top
        return {"part_relevance": found.where(visible.any(dim=1), torch.nan)}
