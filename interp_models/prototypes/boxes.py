"""The receptive fields of cells, as spans of pixels."""

from collections.abc import Callable

import torch
from torch import Tensor


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
