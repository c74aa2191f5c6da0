"""Regions of maps: components, boxes and overlaps, the building blocks of localisation metrics."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from interp_models.core.boxes import Boxes, components
from interp_models.core.maps import full_precision, stretched
from interp_models.metrics.case import Case


def soft_masks(case: Case) -> Tensor:
    """The maps of a case, upsampled bilinearly to the images and scaled to [0, 1] each, (B, H, W)."""
    return stretched(case.maps, case.size)[:, 0]


def share_of(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, NaN where the whole is 0."""
    return part / torch.where(whole != 0, whole, torch.nan)


def top_pixels(masks: Tensor, counts: Tensor) -> Tensor:
    """The most salient pixels, as the probability of each pixel to be chosen, (B, H, W).

    Of equal pixels at the limit each is chosen with equal probability, so that their order does not matter.

    Args:
        masks: (B, H, W).
        counts: number of pixels to choose from each map (B,), at least 1.
    """
    flat = masks.flatten(1)
    limit = flat.sort(dim=1, descending=True).values.gather(1, counts[:, None].long() - 1)
    above, level = flat > limit, flat == limit
    left = counts[:, None] - above.sum(dim=1, keepdim=True)
    chosen = above.to(masks.dtype) + level * (left / level.sum(dim=1, keepdim=True))
    return chosen.view_as(masks)


def overlaps(boxes: Boxes, region: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Intersection over union (n,) of each box with a region (H, W).

    >>> overlaps(np.array([[0, 0, 2, 1]]), np.array([[False, True, True]])).tolist()
    [0.3333333333333333]
    """
    sums = np.pad(region.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))  # of all pixels above and to the left
    left, top, right, bottom = boxes.T
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return np.asarray(inside / ((right - left) * (bottom - top) + sums[-1, -1] - inside))


def box_of_map(mask: NDArray[np.float32]) -> Boxes:
    """The box (1, 4) around the largest connected component of the pixels above the mean of a map (H, W); none (0, 4)
    for a constant map."""
    return components(mask > mask.mean())[:1] if mask.max() > mask.min() else np.empty((0, 4), np.int64)


def slopes(maps: Tensor) -> Tensor:
    """The gradient of maps (B, H, W) by central differences, (B, 2, H, W); beyond the border, values are repeated."""
    padded = F.pad(maps[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    with full_precision(maps):
        down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
        right = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    return torch.stack([down, right], dim=1)
