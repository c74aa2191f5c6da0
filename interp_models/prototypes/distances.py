"""Distances of patches of features to prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.errors import InputError


def squared_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Squared L2 distances of every patch of features (B, D, h, w) to every prototype (P, D, a, b).

    ‖z - p‖² = ‖z‖² - 2 <z, p> + ‖p‖² with one product for all prototypes and one sum of squares for all of them;
    float32 or better also under autocast, as the three terms nearly cancel at a match. Never below 0.

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
        norms = prototypes.square().sum(dim=(1, 2, 3))  # (P,)
        energy = features.square().sum(dim=1, keepdim=True)  # (B, 1, h, w)
        energy = F.avg_pool2d(energy, size, stride=1, divisor_override=1)
        # No convolution: on GPUs its products would be of TF32.
        products = torch.einsum("pd,bdn->bpn", prototypes.flatten(1), unfolded(features, size))
        products = products.view(len(features), len(prototypes), *energy.shape[-2:])
        return (energy - 2 * products + norms[:, None, None]).relu()


def unfolded(features: Tensor, size: torch.Size) -> Tensor:
    """The patches of a cells × b cells of features (B, D, h, w), row by row: (B, D·a·b, h'·w')."""
    return features.flatten(2) if size == (1, 1) else F.unfold(features, size)


def over_cells(distances: Tensor, prototypes: torch.Size) -> Tensor:
    """For each cell the smallest of the distances (..., h', w') of the patches that it is part of, (..., h, w).

    Args:
        distances: to all patches.
        prototypes: shape of the prototypes, (P, D, a, b).
    """
    high, wide = prototypes[2:]
    if (high, wide) == (1, 1):
        return distances
    padded = F.pad(-distances.flatten(0, -3), (wide - 1, wide - 1, high - 1, high - 1), value=-torch.inf)
    cells = -F.max_pool2d(padded, (high, wide), stride=1)
    return cells.view(*distances.shape[:-2], *cells.shape[-2:])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of `a`, also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.to(a.dtype)


def root(squared: Tensor) -> Tensor:
    """√(d² + 1e-14), whose derivative is finite at 0."""
    return (squared + 1e-14).sqrt()
