"""Bilinear attention pooling, and what WS-DAN's recipe adds to it.

Hu and Qi, "See better before looking closer: weakly supervised data augmentation network for fine-grained visual
classification", 2019 (WS-DAN, arXiv:1901.09891): the pooling of equations 1 to 3, the centres of its attention
regularisation, attention cropping and dropping.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.distributed import gathered


def attention_filters(channels: int, n_maps: int) -> nn.Conv2d:
    """The 1×1 convolution of the maps.

    All maps start near 1, the average pool of a plain CNN: a random filter on features that are not below 0 has one
    sign all over an image, and a map that starts below 0 everywhere never wakes.
    """
    filters = nn.Conv2d(channels, n_maps, kernel_size=1)
    nn.init.ones_(cast(Tensor, filters.bias))
    return filters


def bilinear_attention_pool(features: Tensor, maps: Tensor) -> Tensor:
    """Weighted average pool of features (B, C, h, w) by each of the maps (B, N, h, w): (B, N, C), divided by h·w."""
    # The order of the product matters to the gradient's memory layout: with the maps first, the gradient of a single
    # image's features has strides that batch norm's backward on CPU misreads (torch 2.12).
    root = math.sqrt(maps[0, 0].numel())  # half before and half after the sum, which in float16 would overflow
    return (features.flatten(2) @ (maps / root).flatten(2).transpose(1, 2)).transpose(1, 2) / root


def pooled_vectors(features: Tensor, maps: Tensor, *, normalise: bool) -> Tensor:
    """What the classifier of WS-DAN reads, (B, N, C): the pooled features f, or 100 times their `unit` vector."""
    pooled = bilinear_attention_pool(features, maps)
    return 100 * unit(pooled) if normalise else pooled


def unit(pooled: Tensor) -> Tensor:
    """sign(f) √|f| of pooled features (B, N, C), divided by the length of all of an image's."""
    pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))  # float16 has no 1e-12
    rooted = pooled.sign() * (pooled.abs() + 1e-12).sqrt()  # whose slope at 0 would be infinite
    return F.normalize(rooted.flatten(1), dim=1).view_as(pooled)


class Centres(nn.Module):
    """A centre c_k of the pooled vectors of each class, to whose direction vectors are drawn; in a buffer.

    Args:
        num_classes: classes K.
        size: numbers of a vector D.
    """

    rows: Tensor
    """(K, D)."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_classes, size))

    def away(self, vectors: Tensor, targets: Tensor) -> Tensor:
        """P_i - c_yi / |c_yi| of vectors P (B, D), (B, D)."""
        return vectors - F.normalize(self.rows[targets], dim=1)

    def forward(self, vectors: Tensor, targets: Tensor) -> Tensor:
        """The loss: mean_i ‖P_i - c_yi / |c_yi|‖²."""
        return self.away(vectors, targets).square().sum(dim=1).mean()

    def move(self, vectors: Tensor, targets: Tensor) -> None:
        """c_k += 0.05 Σ_i (P_i - c_k / |c_k|) over the images i of class k, on all ranks."""
        rows, labels = gathered(self.away(vectors, targets)), gathered(targets)
        self.rows.index_add_(0, labels.flatten(), 0.05 * rows.flatten(0, 1).to(self.rows.dtype))


@torch.no_grad()
def crop_and_drop(images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) cropped around a map, and with the place of a map blacked out (WS-DAN, section 3.2).

    Two maps of (B, N, h, w) are drawn for each image, in proportion to the roots of their sums. The crop is the box,
    a tenth of the image wider on each side, of where the first is at least θ of its highest value, θ ~ U(0.4, 0.6),
    stretched to the whole image; black is where the second is at least θ, θ ~ U(0.2, 0.5).
    """
    size, maps = (images.shape[2], images.shape[3]), maps.float()  # float16 has no 1e-12
    # An image may have no map, and a training that diverges maps that are no numbers, of which the loss tells.
    weights = maps.clamp(min=0).sum(dim=(2, 3)).sqrt().nan_to_num(0.0, 1.0) + 1e-6
    drawn = torch.multinomial(weights, 2, replacement=True)
    chosen = maps.gather(1, drawn[:, :, None, None].expand(-1, -1, *maps.shape[2:]))
    large = F.interpolate(chosen, size=size, mode="bilinear", align_corners=False)
    uniform = torch.rand(len(images), 2, device=images.device)
    theta = torch.stack([0.4 + 0.2 * uniform[:, 0], 0.2 + 0.3 * uniform[:, 1]], dim=1)
    highest = large.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)  # of no map nothing is high
    high = large >= theta[:, :, None, None] * highest  # (B, 2, H, W)
    (top, bottom), (left, right) = (_ends(high[:, 0].any(dim=axis)) for axis in (2, 1))
    affine = torch.zeros(len(images), 2, 3, device=images.device)
    affine[:, 0, 0], affine[:, 0, 2] = right - left, right + left - 1
    affine[:, 1, 1], affine[:, 1, 2] = bottom - top, bottom + top - 1
    grid = F.affine_grid(affine.to(images.dtype), list(images.shape), align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops, images * ~high[:, 1:]


def _ends(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Where a row (B, n) of marks begins and ends, a tenth wider, in fractions of n."""
    n, marks = inside.shape[1], inside.int()
    first, last = marks.argmax(dim=1), n - marks.flip(1).argmax(dim=1)
    return (first / n - 0.1).clamp(min=0), (last / n + 0.1).clamp(max=1)
