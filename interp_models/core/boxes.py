"""Boxes of maps: around high activations, and around the connected components of a region."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_models.core.maps import upsampled

Size = tuple[int, int]
"""Height and width."""
Boxes = NDArray[np.int64]
"""Boxes (n, 4): left, top, right and bottom in pixels; right and bottom are the first ones outside."""


def activation_boxes(activations: Tensor, size: Size, percentile: float = 95.0) -> Tensor:
    """The smallest box around all pixels whose activation is at or above a percentile.

    Args:
        activations: maps (P, h, w), which are upsampled bicubically to the image.
        size: height and width of the image.
        percentile: percentile of the activation over the pixels of the image (paper: 95).

    Returns:
        Boxes (P, 4) int64, XYXY in pixels, the ends exclusive.
    """
    boxes = []
    # A pixel is at or above the interpolated percentile if it is at or above the next larger value in the map.
    count = size[0] * size[1]
    position = min(int(percentile / 100 * (count - 1) + 1 - 1e-9), count - 1)
    for large in upsampled(activations, size):
        thresholds = np.partition(large.flatten(1).numpy(), position, axis=1)[:, position]
        spans = []
        for axis in (large.amax(dim=1), large.amax(dim=2)):  # columns, rows
            high = axis >= torch.from_numpy(thresholds)[:, None]
            spans += [high.int().argmax(dim=1), high.shape[1] - high.flip(1).int().argmax(dim=1)]
        boxes.append(torch.stack([spans[0], spans[2], spans[1], spans[3]], dim=1))
    return torch.cat(boxes).to(activations.device)


def components(region: NDArray[np.bool_]) -> Boxes:
    """The boxes (n, 4) of the connected components of a region (H, W); that of the largest component comes first.

    Pixels that share a side are connected.

    >>> components(np.array([[True, False, True], [True, False, False]])).tolist()
    [[0, 0, 1, 2], [2, 0, 3, 1]]
    """
    from scipy import ndimage  # type: ignore[import-untyped]  # slow to import, and only needed here

    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return np.empty((0, 4), np.int64)
    top, left = rows[0], columns[0]
    labels, _ = ndimage.label(region[top : rows[-1] + 1, left : columns[-1] + 1])
    spans = ndimage.find_objects(labels)
    boxes: Boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in spans]) + np.array([left, top] * 2)
    return boxes[np.argsort(-np.bincount(labels.ravel())[1:], kind="stable")]
