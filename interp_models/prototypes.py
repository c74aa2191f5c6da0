"""What prototype models share: distances between patches of a map of features and prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Squared L2 distances of every patch of features (B, D, h, w) to every prototype (P, D, a, b).

    ‖z - p‖² = ‖z‖² - 2 <z, p> + ‖p‖² with one product for all prototypes and one sum of squares for all of them;
    float32 or better also under autocast, as the three terms nearly cancel at a match. Never below 0.

    Returns:
        (B, P, h - a + 1, w - b + 1).

    >>> squared_distances(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[1.0]]], [[[4.0]]]])).tolist()
    [[[[0.0, 1.0]], [[9.0, 4.0]]]]
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
        prototypes = prototypes.to(features.dtype)
        size = prototypes.shape[-2:]
        norms = prototypes.square().sum(dim=(1, 2, 3))  # (P,)
        energy = features.square().sum(dim=1, keepdim=True)  # (B, 1, h, w)
        if size == (1, 1):
            product = torch.einsum("pd,bdn->bpn", prototypes[:, :, 0, 0], features.flatten(2))
            product = product.unflatten(2, features.shape[-2:])
        else:
            energy = F.avg_pool2d(energy, size, stride=1, divisor_override=1)
            product = F.conv2d(features, prototypes)
        return (energy - 2 * product + norms[:, None, None]).relu()
