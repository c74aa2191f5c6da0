"""Bilinear attention pooling, and the other elements of WS-DAN: centres, attention cropping and attention dropping.

Source: Hu and Qi, "See better before looking closer: weakly supervised data augmentation network for fine-grained
visual classification", 2019 (arXiv:1901.09891). Equations 1 to 3 are the pooling.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.distributed import gathered
from interp_models.core.maps import at_least_float32


def attention_filters(channels: int, n_maps: int) -> nn.Conv2d:
    """The 1×1 convolution that makes attention maps from features.

    The bias starts at 1, so pooling starts close to the average pooling of a plain CNN. With a bias of 0, a random
    filter on features after a ReLU often has one sign all over the image. A map that is below 0 everywhere would have
    no gradient through its ReLU.
    """
    filters = nn.Conv2d(channels, n_maps, kernel_size=1)
    nn.init.ones_(cast(Tensor, filters.bias))
    return filters


def bilinear_attention_pool(features: Tensor, maps: Tensor) -> Tensor:
    """Mean over cells of features (B, C, h, w) times each map (B, N, h, w): (B, N, C)."""
    # Features come first in the product: otherwise the gradient of a single image's features has strides that batch
    # norm's backward on CPU misreads (torch 2.12).
    root = math.sqrt(maps[0, 0].numel())  # dividing by √(h·w) before and after the sum avoids overflow in float16
    return (features.flatten(2) @ (maps / root).flatten(2).transpose(1, 2)).transpose(1, 2) / root


def pooled_vectors(features: Tensor, maps: Tensor, *, normalise: bool) -> Tensor:
    """The input of WS-DAN's classifier, (B, N, C): the pooled features f, or with `normalise` 100 · unit(f)."""
    pooled = bilinear_attention_pool(features, maps)
    return 100 * unit(pooled) if normalise else pooled


def unit(pooled: Tensor) -> Tensor:
    """v / |v| with v = sign(f) √|f| of the pooled features f (B, N, C); |v| is the norm over all N · C values."""
    pooled = at_least_float32(pooled)  # 1e-12 is 0 in float16
    rooted = pooled.sign() * (pooled.abs() + 1e-12).sqrt()  # the slope of √ at 0 is infinite
    return F.normalize(rooted.flatten(1), dim=1).view_as(pooled)


class Centres(nn.Module):
    """Class centres c_k: a loss pulls the pooled vectors of class k towards the direction of c_k.

    Centres are a buffer, and follow the vectors by `move`.

    Args:
        num_classes: number of classes K.
        size: dimension D of the vectors.
    """

    rows: Tensor
    """The centres, (K, D)."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_classes, size))

    def away(self, vectors: Tensor, targets: Tensor) -> Tensor:
        """P_i - c_yi / |c_yi| for vectors P (B, D) of classes y: (B, D)."""
        return vectors - F.normalize(self.rows[targets], dim=1)

    def forward(self, vectors: Tensor, targets: Tensor) -> Tensor:
        """The loss: mean_i ‖P_i - c_yi / |c_yi|‖²."""
        return self.away(vectors, targets).square().sum(dim=1).mean()

    def move(self, vectors: Tensor, targets: Tensor) -> None:
        """Update c_k += 0.05 Σ_i (P_i - c_k / |c_k|), with the sum over the images i of class k on all ranks."""
        rows, labels = gathered(self.away(vectors, targets)), gathered(targets)
        self.rows.index_add_(0, labels.flatten(), 0.05 * rows.flatten(0, 1).to(self.rows.dtype))


@torch.no_grad()
def crop_and_drop(images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Attention cropping and attention dropping (WS-DAN, section 3.2).

    For each image two of its maps are drawn, with probabilities in proportion to the square root of their sums. The
    crop is the box around the cells where the first map is at least θ times its maximum, θ ~ U(0.4, 0.6). The box is
    extended by a tenth of the image on each side, and resized to the whole image. The drop sets pixels to black where
    the second map is at least θ times its maximum, θ ~ U(0.2, 0.5).

    Args:
        images: (B, 3, H, W).
        maps: attention maps (B, N, h, w), not negative.

    Returns:
        The cropped images, and the images with a dropped region, (B, 3, H, W) each.
    """
    size, maps = (images.shape[2], images.shape[3]), maps.float()  # 1e-12 is 0 in float16
    # All maps may be 0. Those of a diverging training may be NaN; the loss reports that.
    weights = maps.clamp(min=0).sum(dim=(2, 3)).sqrt().nan_to_num(0.0, 1.0) + 1e-6
    drawn = torch.multinomial(weights, 2, replacement=True)
    chosen = maps.gather(1, drawn[:, :, None, None].expand(-1, -1, *maps.shape[2:]))
    large = F.interpolate(chosen, size=size, mode="bilinear", align_corners=False)
    uniform = torch.rand(len(images), 2, device=images.device)
    theta = torch.stack([0.4 + 0.2 * uniform[:, 0], 0.2 + 0.3 * uniform[:, 1]], dim=1)
    highest = large.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)  # nothing is high in a map of zeros
    high = large >= theta[:, :, None, None] * highest  # (B, 2, H, W)
    (top, bottom), (left, right) = (_ends(high[:, 0].any(dim=axis)) for axis in (2, 1))
    affine = torch.zeros(len(images), 2, 3, device=images.device)
    affine[:, 0, 0], affine[:, 0, 2] = right - left, right + left - 1
    affine[:, 1, 1], affine[:, 1, 2] = bottom - top, bottom + top - 1
    grid = F.affine_grid(affine.to(images.dtype), list(images.shape), align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops, images * ~high[:, 1:]


def _ends(inside: Tensor) -> tuple[Tensor, Tensor]:
    """First and last marked position of each row (B, n), extended by a tenth on each side, in fractions of n."""
    n, marks = inside.shape[1], inside.int()
    first, last = marks.argmax(dim=1), n - marks.flip(1).argmax(dim=1)
    return (first / n - 0.1).clamp(min=0), (last / n + 0.1).clamp(max=1)
