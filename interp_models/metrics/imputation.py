"""Linear imputation of removed pixels, as in ROAD."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.maps import at_least_float32
from interp_models.core.rng import uniform

TOLERANCE = 1e-5
"""Relative residual at which the equations count as solved."""
MOST_ITERATIONS = 1000
LEVELS = 4
"""Number of coarser grids."""


def impute(images: Tensor, known: Tensor) -> Tensor:
    """Fill unknown pixels with the weighted mean of their eight neighbours, known or filled (Rong et al., ICML 2022).

    Neighbours along rows and columns weigh 1/6, those along diagonals 1/12; at the border, weights of the neighbours
    that exist add up to less, and are scaled to 1. The linear equations of all images are solved together by conjugate
    gradients with a multigrid cycle as preconditioner. An image without a known pixel becomes 0.

    Args:
        images: (n, C, H, W).
        known: whether each pixel is known, (n, H, W) bool.

    Returns:
        (n, C, H, W); known pixels are unchanged.
    """
    height, width = images.shape[-2:]
    side = 2**LEVELS
    margin = (0, -width % side, 0, -height % side)  # coarser grids have half the size
    whole = at_least_float32(images)
    given = F.pad(whole * known[:, None], margin)
    exists = F.pad(torch.ones_like(known[:, None], dtype=whole.dtype), margin)
    unknown = F.pad((~known[:, None]).to(whole.dtype), margin)
    filled = _solve(unknown * neighbours(given), _levels(exists, unknown))[..., :height, :width]
    return torch.where(known[:, None], images, filled.to(images.dtype))


def neighbours(x: Tensor) -> Tensor:
    """The weighted sum of each pixel's eight neighbours; those beyond the border count as 0.

    >>> neighbours(torch.tensor([[[[0.0, 12, 0], [0, 0, 0]]]])).tolist()
    [[[[2.0, 0.0, 2.0], [1.0, 2.0, 1.0]]]]
    """
    padded = F.pad(x, (1, 1, 1, 1))  # sums of slices take a tenth of the time of a convolution
    rows = padded[..., :-1] + padded[..., 1:]
    rows = rows[..., :-1] + rows[..., 1:]
    both = rows[..., :-1, :] + rows[..., 1:, :]
    both = both[..., :-1, :] + both[..., 1:, :]  # [1, 2, 1] along both axes
    return both.sub_(x, alpha=4).div_(12)


class _Level(NamedTuple):
    """The equations Σ w · x - neighbours(x) = right of the unknown pixels on one grid."""

    unknown: Tensor
    """1 for unknown pixels, else 0, (n, 1, h, w)."""
    total: Tensor
    """Sum of the weights of the neighbours that exist."""

    def apply(self, x: Tensor) -> Tensor:
        """The left side of the equations."""
        return self.unknown * (self.total * x - neighbours(x))


def _levels(exists: Tensor, unknown: Tensor) -> list[_Level]:
    """The equations on all grids, the finest first. A coarse pixel is unknown if all of its four pixels are."""
    levels: list[_Level] = []
    for level in range(LEVELS + 1):
        if level:
            unknown, exists = 1 - F.max_pool2d(1 - unknown, 2), F.max_pool2d(exists, 2)
        levels.append(_Level(unknown, neighbours(exists).clamp(min=1 / 12)))
    return levels


def _cycle(right: Tensor, levels: list[_Level]) -> Tensor:
    """One multigrid V-cycle: an approximate solution of the equations, linear and symmetric in `right`."""
    (unknown, total), *coarser = levels
    x = unknown * right / total  # a Jacobi step, from 0
    if not coarser:
        for _ in range(4):
            x = x + (right - levels[0].apply(x)) / total
        return x
    rest = 4 * F.avg_pool2d(right - levels[0].apply(x), 2)  # the sum of four pixels
    error = _cycle(rest * coarser[0].unknown, coarser)
    x = x + unknown * F.interpolate(error, scale_factor=2, mode="nearest")
    return x + (right - levels[0].apply(x)) / total


def _solve(right: Tensor, levels: list[_Level]) -> Tensor:
    """The solution of the equations of the finest level by preconditioned conjugate gradients."""
    x, residual = torch.zeros_like(right), right
    direction = _cycle(residual, levels)
    energy = _dot(residual, direction)
    enough = TOLERANCE**2 * energy
    for _ in range(MOST_ITERATIONS):
        if bool((energy <= enough).all()):
            break
        image = levels[0].apply(direction)
        step = energy / _dot(direction, image).clamp(min=1e-30)
        x, residual = x.addcmul(step, direction), residual.addcmul(step, image, value=-1)
        better = _cycle(residual, levels)
        before, energy = energy, _dot(residual, better)
        direction = better.addcmul(energy / before.clamp(min=1e-30), direction)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products (n, C, 1, 1) of images."""
    return (a * b).sum(dim=(2, 3), keepdim=True)


def normal_noise(channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise (C, H, W), the same in every call."""
    draws = uniform(0, np.arange(channels * height * width)).reshape(channels, height, width)
    return torch.erfinv(torch.as_tensor(2 * draws - 1).clamp(-1 + 1e-12, 1 - 1e-12)) * 2**0.5
