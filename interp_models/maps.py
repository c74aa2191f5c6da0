"""Maps on the grids of features and of images."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def upsampled(maps: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Maps (n, h, w) stretched bicubically to `size`, as (up to 64, *size) float32 on the CPU at a time.

    The same as `torch.nn.functional.interpolate` without its detours: rows and columns by a matrix each.
    """
    rows, columns = (
        F.interpolate(torch.eye(cells)[None, None], size=(n, cells), mode="bicubic", align_corners=False)[0, 0]
        for cells, n in zip(maps.shape[-2:], size, strict=True)
    )
    for some in torch.split(maps.detach().float().cpu(), 64):  # 64 maps of 224 x 224 pixels take 13 MB
        yield rows @ some @ columns.T
