"""Linear imputation of removed pixels, as in ROAD."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.maps import full_precision
from interp_models.core.rng import uniform

TOLERANCE = 1e-5
"""Relative residual at which the equations count as solved."""
MOST_ITERATIONS = 1000
SMALLEST = 8
"""Sides of the coarsest level are at least so long."""


def impute(images: Tensor, known: Tensor) -> Tensor:
    """Fill unknown pixels with the weighted mean of their eight neighbours, known or filled (Rong et al., ICML 2022).

    Neighbours along rows and columns weigh 1/6, those along diagonals 1/12; at the border, weights of the neighbours
    that exist add up to less, and are scaled to 1. The linear equations of all images are solved together by conjugate
    gradients, from a solution on a grid of half the size. An image without a known pixel becomes 0.

    Args:
        images: (n, C, H, W).
        known: whether each pixel is known, (n, H, W) bool.

    Returns:
        (n, C, H, W); known pixels are unchanged.
    """
    weight = known[:, None].to(images.dtype)
    with full_precision(images):
        filled = _solve(images * weight, weight)
    return torch.where(known[:, None], images, filled)


def _solve(images: Tensor, known: Tensor) -> Tensor:
    """The filled images, from those with 0 at unknown pixels and `known` (n, 1, H, W) in {0, 1}."""
    start = torch.zeros_like(images)
    if min(images.shape[-2:]) >= 2 * SMALLEST:
        # Half the size: the mean of the known pixels of each 2 x 2 block, which is known if one of them is.
        share = F.avg_pool2d(known, 2, ceil_mode=True, count_include_pad=False)
        coarse = F.avg_pool2d(images, 2, ceil_mode=True, count_include_pad=False) / share.clamp(min=1e-6)
        smaller = _solve(coarse * (share > 0), (share > 0).to(images.dtype))
        start = F.interpolate(smaller, size=images.shape[-2:], mode="bilinear", align_corners=False)
    kernel = images.new_tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12
    kernels = kernel.expand(images.shape[1], 1, 3, 3)
    total = F.conv2d(torch.ones_like(known), kernel[None, None], padding=1)  # less than 1 at the border
    unknown = 1 - known

    def neighbours(x: Tensor) -> Tensor:
        return F.conv2d(x, kernels, padding=1, groups=x.shape[1])

    def apply(x: Tensor) -> Tensor:
        return unknown * (total * x - neighbours(x))

    right = unknown * neighbours(images)
    x = unknown * start
    residual = right - apply(x)
    direction = residual / total
    energy = _dot(residual, direction)
    enough = TOLERANCE**2 * _dot(right, right / total)
    for _ in range(MOST_ITERATIONS):
        if bool((energy <= enough).all()):
            break
        image = apply(direction)
        step = energy / _dot(direction, image).clamp(min=1e-30)
        x, residual = x + step * direction, residual - step * image
        scaled = residual / total
        before, energy = energy, _dot(residual, scaled)
        direction = scaled + energy / before.clamp(min=1e-30) * direction
    return x * unknown + images * known


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products (n, C, 1, 1) of images."""
    return (a * b).sum(dim=(2, 3), keepdim=True)


def normal_noise(channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise (C, H, W), the same in every call."""
    draws = uniform(0, np.arange(channels * height * width)).reshape(channels, height, width)
    return torch.erfinv(torch.as_tensor(2 * draws - 1).clamp(-1 + 1e-12, 1 - 1e-12)) * 2**0.5
