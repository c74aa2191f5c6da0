"""Whether the cells of a feature map lie on the image in order.

Noise in a stripe of the image changes the cells of that stripe most, and others the less, the farther they are. If the
cells are in order, one function of the distance explains nearly all changes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MOST = 8
"""Most stripes of rows, and of columns, in which noise is tried."""
EXPLAINED = 0.8
"""Least share of the changes that the distance must explain. Measured: 0.87 to 1.0 for networks of torchvision, and for
trained ones on photographs; at most 0.66 if cells are exchanged within quarters, or moved on by one."""
CLEAR = 0.1
"""If a share is this far from `EXPLAINED`, one image is enough."""
LEAST = 0.02
"""Least standard deviation of the logarithms of the changes."""


def order(image: Tensor, grid: tuple[int, int], read: Callable[[Tensor], Tensor]) -> float | None:
    """How well the distance between a stripe with noise and a cell explains the cell's change, from 0 to 1.

    Args:
        image: one image, (1, C, H, W).
        grid: rows h and columns w of the map.
        read: computes the feature maps (N, C, h, w) of images (N, C, H, W).

    Returns:
        The smaller share of variance (adjusted R²) of rows and columns; 0 if changes grow with the distance or hardly
        differ. None if the map does not change at all.
    """
    logs: list[list[Tensor]] = []
    for base in (image, image.flip(2, 3)):
        features = read(probes(base, grid))
        change = (features[1:] - features[:1]).detach().abs().float().mean(dim=1)
        change = change.view(draws(grid), -1, *grid).mean(dim=0)
        if float(change.max()) <= 1e-6 * float(features.detach().abs().max()):
            return None
        parts = torch.split(change, [n for n in map(stripes, grid) if n > 1])
        logs.append([_centred((part + 1e-3 * part.mean()).log()) for part in parts])
        axes = [axis for axis in (0, 1) if stripes(grid[axis]) > 1]
        means = [torch.stack(some).mean(dim=0) for some in zip(*logs, strict=True)]
        share = min(_share(log, axis) for log, axis in zip(means, axes, strict=True))
        if abs(share - EXPLAINED) > CLEAR:
            break
    return share


def stripes(cells: int) -> int:
    """Number of stripes for a number of rows or columns of cells."""
    return cells if cells <= MOST else next((n for n in range(MOST, MOST // 2, -1) if cells % n == 0), MOST - 1)


def draws(grid: tuple[int, int]) -> int:
    """How often noise is drawn: few large cells see much of the image, so that their changes differ little."""
    count = max(map(stripes, grid))
    return max(1, (MOST if count > 3 else 2 * MOST) // count)


def probes(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image (1, C, H, W), and copies of it with noise in one stripe of rows or of columns each, `draws` times."""
    low, high = (float(value) for value in torch.aminmax(image))
    low, high = (low, high) if low < high else (0.0, 1.0)
    generator, made = torch.Generator().manual_seed(0), [image]
    for axis in (0, 1) * draws(grid):
        count, side = stripes(grid[axis]), image.shape[2 + axis]
        for stripe in range(count if count > 1 else 0):
            noise = low + (high - low) * torch.rand(image.shape, generator=generator).to(image)
            first, last = round(stripe * side / count), round((stripe + 1) * side / count)
            probe, length = image.clone(), last - first
            probe.narrow(2 + axis, first, length).copy_(noise.narrow(2 + axis, first, length))
            made.append(probe)
    return torch.cat(made)


def _centred(log: Tensor) -> Tensor:
    """Logarithms (stripes, h, w) without what a stripe changes everywhere, and what a cell changes always."""
    log = log - log.mean(dim=(1, 2), keepdim=True)
    return log - log.mean(dim=0, keepdim=True)


def _share(log: Tensor, axis: int) -> float:
    """The share of the variance of centred logarithms that a function of the distance along an axis explains."""
    count, cells = len(log), log.shape[1 + axis]
    if float(log.std()) < LEAST:
        return 0.0
    y = log.flatten().double()
    shares = []
    for offset in (-0.5, 0.0, 0.5):  # strides and padding can move what a cell sees by half a cell
        own = (torch.arange(cells, device=log.device) + 0.5 + offset) / cells * count - 0.5
        own = own[:, None].expand(log.shape[1:]) if axis == 0 else own[None].expand(log.shape[1:])
        distance = (torch.arange(count, device=log.device)[:, None, None] - own).abs()
        if float(_centred(-distance).flatten().double() @ y) <= 0:
            continue
        steps = (2 * distance + 1e-4).floor()
        x = torch.stack([_centred((steps == step).float()).flatten() for step in torch.unique(steps)], dim=1).double()
        left = y - x @ (torch.linalg.pinv(x, rtol=1e-6) @ y)
        free, used = (count - 1) * (log[0].numel() - 1), x.shape[1] - 1
        shares.append(1 - float(left @ left / (y @ y)) * free / max(1, free - used))
    return max([0.0, *shares])
