"""Operations on maps: resizing, normalisation, weighted sums."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def upsampled(maps: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Resize maps (n, h, w) bicubically to `size`; yields float32 tensors (up to 64, *size) on the CPU.

    The result is that of `torch.nn.functional.interpolate`. Two matrix products, for rows and for columns, are faster.
    """
    units = (torch.eye(cells, dtype=torch.float32)[None, None] for cells in maps.shape[-2:])
    rows, columns = (
        F.interpolate(unit, size=(n, unit.shape[-1]), mode="bicubic", align_corners=False)[0, 0]
        for unit, n in zip(units, size, strict=True)
    )
    for some in torch.split(maps.detach().float().cpu(), 64):  # 64 maps of 224 x 224 pixels take 13 MB
        with torch.autocast("cpu", enabled=False):
            large = rows @ some @ columns.T
        yield large


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (B, h, w) bilinearly to `size`, (B, H, W)."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def stretched(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (B, h, w) bilinearly and scale each to [0, 1] by its minimum and maximum: (B, 1, H, W).

    Constant maps become 0.
    """
    large = enlarged(maps, size)[:, None]
    low, high = large.amin(dim=(2, 3), keepdim=True), large.amax(dim=(2, 3), keepdim=True)
    return (large - low) / torch.where(high > low, high - low, 1.0)


def weighted(weights: Tensor, maps: Tensor) -> Tensor:
    """The weighted sum Σ_k w_k A_k, (B, h, w), of maps A (B, C, h, w) with weights w (B, C).

    It has the precision of its inputs, also under autocast.

    >>> weighted(torch.tensor([[2.0, 3.0]]), torch.ones(1, 2, 1, 1)).tolist()
    [[[5.0]]]
    """
    return (weights[:, :, None, None] * maps).sum(dim=1)


def full_precision(x: Tensor) -> torch.autocast:
    """A context that switches autocast off, for sums that need the full precision."""
    return torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
