"""Localisation by boxes: the pointing game, the energy in the box, F1, and boxes around the map."""

from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.truth import in_boxes
from interp_models.metrics.base import METRICS, UnchangedImages
from interp_models.metrics.case import Case
from interp_models.metrics.regions import box_of_map, overlaps, share_of, soft_masks

TOLERANCE = 15 / 224
"""Tolerance of the pointing game, as a fraction of the image's shorter side: 15 pixels of 224, as in TorchRay."""
HIT = 0.5
"""A box hits an object if their intersection over union is larger than this."""


class BoxMetric(UnchangedImages):
    """Abstract: a metric that compares maps with boxes, without a pass of the model."""

    family = "localisation"
    needs: ClassVar[tuple[str, ...]] = ("boxes",)
    percent = True


@METRICS.register("box_localisation")
class BoxLocalisation(BoxMetric):
    """How well a map finds the object, by its boxes. The map m is upsampled to the image and scaled to [0, 1].

    - `pointing`, the pointing game: 1 if the highest pixel lies in a box, else 0; of several equally high pixels, their
      fraction in a box. Higher is better (Zhang et al., IJCV 2018; without tolerance, as in Opti-CAM).
    - `pointing_15`: the same, but a pixel may lie up to 15/224 of the image's shorter side outside (TorchRay).
    - `energy`, the energy pointing game: Σ m b / Σ m for the union b of the boxes. Higher is better (Wang et al.,
      Score-CAM, CVPR Workshops 2020).
    - `f1`: 2 p r / (p + r) with precision p = Σ m b / Σ m and recall r = Σ m b / Σ b, of the box b with the highest
      value. Higher is better (Dabkowski and Gal 2017; Zolna et al. 2020).
    - `le`, localisation error: 0 if the box around the largest connected component of {m > mean m} has an intersection
      over union above 0.5 with a box, else 1. Lower is better (Cao et al. 2015, as in Opti-CAM).

    All are in [0, 1], and undefined for an image without a box. See `MapMetric` for the arguments.
    """

    keys = ("pointing", "pointing_15", "energy", "f1", "le")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {
        "pointing": True, "pointing_15": True, "energy": True, "f1": True, "le": False,
    }  # fmt: skip
    legend: ClassVar[dict[str, str]] = {
        "pointing": "Pointing game: the fraction of images whose most salient pixel lies in the object's box.",
        "pointing_15": "Pointing game with a tolerance of 15 of 224 pixels.",
        "energy": "Energy pointing game: the fraction of the map's sum that lies in the object's box.",
        "f1": "F1 score of the map as a soft mask of the object's box.",
        "le": "Localisation error: the fraction of images where the box around the map misses the object's box.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        assert case.truth.boxes is not None
        size = case.size
        masks, inside = soft_masks(case), in_boxes(case.truth.boxes, size)  # (B, H, W), (B, M, H, W)
        any_box = inside.any(dim=1)
        known = any_box.any(dim=(1, 2))
        return {
            "pointing": pointing(masks, case.truth.boxes, 0.0).where(known, torch.nan),
            "pointing_15": pointing(masks, case.truth.boxes, TOLERANCE * min(size)).where(known, torch.nan),
            "energy": share_of((masks * any_box).sum(dim=(1, 2)), masks.sum(dim=(1, 2))).where(known, torch.nan),
            "f1": f1(masks, inside),
            "le": localisation_error(masks, inside),
        }


@METRICS.register("om")
class OfficialMetric(BoxMetric):
    """`om`, the official metric of localisation: 0 if `le` is 0 and the model's prediction is the label, else 1.

    It is undefined for an image without a box or without a label. Lower is better (Zolna et al. 2020, after ImageNet's
    localisation task). See `MapMetric` for the arguments.
    """

    needs = ("boxes", "correct")
    keys = ("om",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"om": False}
    legend: ClassVar[dict[str, str]] = {
        "om": "Official metric: the fraction of images that are misclassified or whose object the map's box misses."
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        assert case.truth.boxes is not None
        assert case.correct is not None
        inside = in_boxes(case.truth.boxes, case.size)
        return {"om": 1 - (1 - localisation_error(soft_masks(case), inside)) * case.correct}


def pointing(masks: Tensor, boxes: Tensor, tolerance: float) -> Tensor:
    """The fraction (B,) of the highest pixels of each map (B, H, W) whose distance to a box (B, M, 4) is at most
    `tolerance` pixels."""
    size = (masks.shape[-2], masks.shape[-1])
    if tolerance:
        y, x = (torch.arange(n, device=masks.device) + 0.5 for n in size)
        left, top, right, bottom = boxes[..., None].unbind(dim=2)
        down = torch.maximum(top - y, y - bottom).clamp(min=0)
        across = torch.maximum(left - x, x - right).clamp(min=0)
        near = (down[..., :, None].square() + across[..., None, :].square()) <= tolerance**2  # false for NaN
    else:
        near = in_boxes(boxes, size)
    highest = masks == masks.amax(dim=(1, 2), keepdim=True)
    return (highest & near.any(dim=1)).sum(dim=(1, 2)) / highest.sum(dim=(1, 2))


def f1(masks: Tensor, inside: Tensor) -> Tensor:
    """The highest F1 score (B,) of soft masks (B, H, W) with one of the boxes, bool (B, M, H, W); NaN without a box."""
    common = (masks[:, None] * inside).sum(dim=(2, 3))
    precision = share_of(common, masks.sum(dim=(1, 2))[:, None])
    recall = share_of(common, inside.sum(dim=(2, 3)).to(common.dtype))
    scores = torch.where(common > 0, 2 * precision * recall / (precision + recall), recall)  # recall: 0, NaN if no box
    best = scores.nan_to_num(-1).amax(dim=1)
    return best.where(best >= 0, torch.nan)


def localisation_error(masks: Tensor, inside: Tensor) -> Tensor:
    """`le` (B,) of soft masks (B, H, W) with boxes, bool (B, M, H, W)."""
    found = []
    for mask, own in zip(masks.cpu().numpy(), inside.cpu().numpy(), strict=True):
        boxes = [box for box in own if box.any()]
        hit = any((overlaps(box_of_map(mask), box) > HIT).any() for box in boxes)
        found.append(float(not hit) if boxes else torch.nan)
    return torch.tensor(found, device=masks.device)
