"""Distances between patches of features and prototypes."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.errors import InputError

Distance = Literal["l2", "cosine"]
"""How patches are compared with prototypes: as they are, or after the vector of each cell was divided by its norm."""

NO_DIRECTION = 1e-6
"""A cell with a smaller norm has no direction. Networks with ReLUs have cells of zeros, for instance in a plain sky."""


def check_channels(distance: Distance, channels: int) -> None:
    """Raise `InputError` for cosines of one channel."""
    if distance == "cosine" and channels < 2:
        raise InputError("model.channels must be at least 2 with model.distance=cosine: one number has no direction")


def squared_distances(features: Tensor, prototypes: Tensor, cosine: bool = False) -> Tensor:
    """Squared L2 distances between every patch of features and every prototype.

    They are computed as ‖z - p‖² = ‖z‖² - 2 <z, p> + ‖p‖², by one matrix product. At a match the terms nearly cancel,
    so the precision is float32 or better, also under autocast. Distances are never negative.

    Args:
        features: (B, D, h, w).
        prototypes: (P, D, a, b).
        cosine: whether both are of `unit`. Then they are computed as the sum of 2 - 2 cos over the cells of the patch,
            with a cos of 0 for cells without a direction.

    Returns:
        (B, P, h - a + 1, w - b + 1).

    Raises:
        InputError: if prototypes are larger than the map.

    >>> squared_distances(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[1.0]]], [[[4.0]]]])).tolist()
    [[[[0.0, 1.0]], [[9.0, 4.0]]]]
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
        prototypes = prototypes.to(features.dtype)
        size = prototypes.shape[-2:]
        if size[0] > features.shape[2] or size[1] > features.shape[3]:
            raise InputError(
                f"prototypes of {size[0]} × {size[1]} cells do not fit on a map of {features.shape[2]} × "
                f"{features.shape[3]}; lower model.prototype_size, or raise data.image_size"
            )
        # A convolution would use TF32 on GPUs.
        products = torch.einsum("pd,bdn->bpn", prototypes.flatten(1), unfolded(features, size))
        grid = (features.shape[2] - size[0] + 1, features.shape[3] - size[1] + 1)
        products = products.view(len(features), len(prototypes), *grid)
        if cosine:
            return (2 * size.numel() - 2 * products).relu()
        norms = prototypes.square().sum(dim=(1, 2, 3))  # (P,)
        energy = features.square().sum(dim=1, keepdim=True)  # (B, 1, h, w)
        energy = F.avg_pool2d(energy, size, stride=1, divisor_override=1)
        return (energy - 2 * products + norms[:, None, None]).relu()


def unfolded(features: Tensor, size: torch.Size) -> Tensor:
    """Patches of size a × b cells of features (B, D, h, w), row by row: (B, D·a·b, h'·w')."""
    return features.flatten(2) if size == (1, 1) else F.unfold(features, size)


def over_cells(distances: Tensor, prototypes: torch.Size) -> Tensor:
    """Turn distances of patches (..., h', w') into a map over cells (..., h, w): the smallest of a cell's patches.

    Args:
        distances: distances of all patches, (..., h', w').
        prototypes: shape of the prototypes, (P, D, a, b).
    """
    high, wide = prototypes[2:]
    if (high, wide) == (1, 1):
        return distances
    padded = F.pad(-distances.flatten(0, -3), (wide - 1, wide - 1, high - 1, high - 1), value=-torch.inf)
    cells = -F.max_pool2d(padded, (high, wide), stride=1)
    return cells.view(*distances.shape[:-2], *cells.shape[-2:])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of a, also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.to(a.dtype)


def unit(x: Tensor) -> Tensor:
    """Divide the vector of each cell, along dimension 1, by its norm. The squared distance of two is 2 - 2 cos.

    A vector with a norm of at most 1e-6 has no direction: it becomes 0, and gets no gradient.

    >>> unit(torch.tensor([[[[3.0]], [[4.0]]]])).flatten().tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        norm = x.norm(dim=1, keepdim=True)
        return torch.where(norm > NO_DIRECTION, x / norm.clamp(min=NO_DIRECTION), torch.zeros_like(x))


def root(squared: Tensor) -> Tensor:
    """√(d² + 1e-14). Its derivative is finite at 0."""
    return (squared + 1e-14).sqrt()
