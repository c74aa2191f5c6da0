"""Boxes in images: around high activations of a prototype, and around the receptive field of a cell."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from interp_models.core.maps import upsampled

Size = tuple[int, int]
"""Height and width."""


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


def receptive_spans(features: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """The receptive field of every cell of the features: the rows and columns of pixels that it depends on.

    They are the pixels where the gradient of the cell is not 0. Cells of one row have the same pixel rows, and cells of
    one column the same pixel columns, so only cells on the diagonal are differentiated. In a network with global
    pooling every cell depends on the whole image.

    Args:
        features: images -> (B, D, h, w).
        image: (1, 3, H, W), such as noise.

    Returns:
        Rows (h, 2) and columns (w, 2) of pixels: the first, and the last + 1, int64.
    """
    with torch.enable_grad():
        image = image.detach().requires_grad_(True)
        z = features(image)[0].abs().sum(dim=0)  # (h, w)
        count = [z.shape[0], z.shape[1]]
        spans = [torch.zeros(n, 2, dtype=torch.int64) for n in count]
        for number in range(max(count)):
            cell = [min(number, n - 1) for n in count]
            (gradient,) = torch.autograd.grad(z[cell[0], cell[1]], image, retain_graph=True)
            seen = (gradient[0] != 0).any(dim=0).cpu()
            for axis in (0, 1):
                pixels = seen.any(dim=1 - axis).nonzero()[:, 0]
                if len(pixels):
                    spans[axis][cell[axis]] = torch.stack([pixels[0], pixels[-1] + 1])
    return spans[0].to(image.device), spans[1].to(image.device)
