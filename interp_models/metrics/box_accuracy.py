"""Box accuracy at the best threshold: MaxBoxAcc and MaxBoxAccV2."""

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_models.core.boxes import components
from interp_models.core.truth import in_boxes
from interp_models.metrics.base import METRICS
from interp_models.metrics.box_localisation import BoxMetric
from interp_models.metrics.case import Case
from interp_models.metrics.regions import overlaps, soft_masks

LEVELS = 255
"""Number of thresholds: maps are rounded to 256 levels, as in the authors' code."""
OVERLAPS = (0.3, 0.5, 0.7)
"""Intersections over union from which on a box counts as found."""


@METRICS.register("box_accuracy")
class BoxAccuracy(BoxMetric):
    """How often boxes around the thresholded map find the object (Choe et al., CVPR 2020).

    The map, upsampled to the image and scaled to [0, 1], is compared with thresholds 0, 1/255, ..., 254/255. One
    threshold is chosen for all images of the evaluation: the one that finds most objects, the first of equals.

    - `box_accuracy` (MaxBoxAcc): 1 if the box around the largest connected component above the threshold has an
      intersection over union of at least 0.5 with a box of the object, else 0.
    - `box_accuracy_v2` (MaxBoxAccV2): the box of any component may do so. It is the mean over intersections over union
      of at least 0.3, 0.5 and 0.7, each at its own best threshold.

    Higher is better. A value is undefined for an image without a box. The threshold is chosen on the images that are
    judged, so values of few images are optimistic. See `MapMetric` for the arguments.
    """

    keys = ("box_accuracy", "box_accuracy_v2")
    width = (len(OVERLAPS), LEVELS)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"box_accuracy": True, "box_accuracy_v2": True}
    legend: ClassVar[dict[str, str]] = {
        "box_accuracy": "MaxBoxAcc: how often the box around the thresholded map matches the object's box, at the best "
        "threshold.",
        "box_accuracy_v2": "MaxBoxAccV2: the same for any component of the map, averaged over three overlaps.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        assert case.truth.boxes is not None
        inside = in_boxes(case.truth.boxes, case.size)
        largest, best = [], []
        for mask, own in zip(soft_masks(case).cpu().numpy(), inside.cpu().numpy(), strict=True):
            first, any_of = _overlaps(mask, [box for box in own if box.any()])
            largest.append(first)
            best.append(any_of)
        return {"box_accuracy": _hits(largest), "box_accuracy_v2": _hits(best)}

    @classmethod
    def over_images(cls, key: str, values: Tensor) -> Tensor:
        """The hits (N,) at the best thresholds, from those at all (N, overlaps, thresholds)."""
        if not len(values):
            return values.new_empty(0)
        best = values.nanmean(dim=0).nan_to_num(0).argmax(dim=1)  # (overlaps,)
        chosen = values.gather(2, best.view(1, -1, 1).expand(len(values), -1, 1))[..., 0]
        return chosen[:, OVERLAPS.index(0.5)] if key == "box_accuracy" else chosen.mean(dim=1)


def _overlaps(mask: NDArray[np.float32], boxes: list[NDArray[np.bool_]]) -> tuple[list[float], list[float]]:
    """At each threshold the highest overlap with a box: of the largest component, and of any; NaN without a box."""
    if not boxes:
        return [np.nan] * LEVELS, [np.nan] * LEVELS
    levels = np.floor(mask * 255).astype(np.uint8)
    around = [components(levels > level) for level in range(LEVELS)]
    found = np.max([overlaps(np.concatenate(around), own) for own in boxes], axis=0)
    of_level = np.split(found, np.cumsum([len(own) for own in around])[:-1])
    largest = [float(own[0]) if len(own) else 0.0 for own in of_level]
    return largest, [float(own.max(initial=0.0)) for own in of_level]


def _hits(overlaps: list[list[float]]) -> Tensor:
    """Whether overlaps (B, thresholds) reach each of `OVERLAPS`, (B, overlaps, thresholds); NaN stays NaN."""
    found = torch.tensor(overlaps)[:, None]
    return torch.where(found.isnan(), found, (found >= torch.tensor(OVERLAPS)[:, None]).float())
