"""Segmentation of images, for explainers that hide segments."""

from typing import Literal

import torch
from torch import Tensor

from interp_models.core.errors import InputError

Segments = Literal["superpixels", "grid"]
"""Kind of segments: superpixels, or cells of a grid."""
Fill = Literal["mean", "black"]
"""Colour of a hidden segment: its mean colour, or black."""


def check_cells(cells: int, images: Tensor) -> None:
    """Raise `InputError` if there are more cells along each side than pixels."""
    size = tuple(images.shape[-2:])
    if cells > min(size):
        raise InputError(f"cells must be at most the side of the images; got {cells} for images of {size} pixels")


def segmented(images: Tensor, cells: int, how: Segments) -> Tensor:
    """The segment number of every pixel, int64 (B, H, W), in [0, cells²)."""
    return superpixels(images, cells) if how == "superpixels" else grid(images, cells)


def grid(images: Tensor, cells: int) -> Tensor:
    """Segments that are the cells of a grid, of nearly equal size and numbered row by row.

    >>> grid(torch.zeros(1, 3, 2, 4), 2).tolist()
    [[[0, 0, 1, 1], [2, 2, 3, 3]]]
    """
    y, x = (torch.arange(n, device=images.device) * cells // n for n in images.shape[-2:])
    return (y[:, None] * cells + x).expand(len(images), -1, -1)


def superpixels(images: Tensor, cells: int, *, compactness: float = 10.0, iterations: int = 10) -> Tensor:
    """SLIC superpixels (Achanta et al., TPAMI 2012): k-means of pixels by colour (CIELAB) and position.

    The clusters start as the cells of a grid. A pixel may join one of the nine cells around it. Two steps of the paper
    are left out: moving the start centres away from edges, and giving isolated pixels to a neighbour segment. So a
    segment need not be connected.

    Args:
        images: (B, C, H, W) in [0, 1]. Only three channels are converted to CIELAB.
        cells: segments along each side; a segment may end up empty.
        compactness: weight m of the distance in space, in units of a cell's side, against the distance in colour.
        iterations: number of k-means iterations.

    Returns:
        The segment number of every pixel, int64 (B, H, W), in [0, cells²).
    """
    (height, width), device = images.shape[-2:], images.device
    start = grid(images, cells)
    side = (height * width) ** 0.5 / cells
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    place = torch.stack([y, x]).float() * (compactness / side)
    pixels = torch.cat([_lab(images.float()), place.expand(len(images), -1, -1, -1)], dim=1).flatten(2)  # (B, D, HW)
    row, column = (start[0] // cells).flatten(), (start[0] % cells).flatten()
    shifts = torch.cartesian_prod(torch.arange(-1, 2, device=device), torch.arange(-1, 2, device=device))
    rows, columns = ((x + shift).clamp(0, cells - 1) for x, shift in ((row, shifts[:, :1]), (column, shifts[:, 1:])))
    candidates = (rows * cells + columns).expand(len(images), -1, -1)  # (B, 9, HW)
    found = start.flatten(1)
    centres = means(pixels, found, cells**2)  # (B, D, P)
    for number in range(iterations):
        if number:
            empty = means(torch.ones_like(pixels[:, :1]), found, cells**2) == 0
            centres = torch.where(empty, centres, means(pixels, found, cells**2))
        distances = torch.stack(
            [
                (pixels - centres.gather(2, some[:, None].expand(-1, pixels.shape[1], -1))).square().sum(dim=1)
                for some in candidates.unbind(dim=1)
            ],
            dim=1,
        )
        nearest = distances.argmin(dim=1, keepdim=True)
        found = candidates.gather(1, nearest)[:, 0]
    return found.view(len(images), height, width)


def means(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Means (B, D, count) of values (B, D, n) over segments (B, n); 0 for empty segments."""
    index = segments[:, None].expand(-1, values.shape[1], -1)
    total = values.new_zeros(*values.shape[:2], count).scatter_add_(2, index, values)
    size = torch.zeros_like(total).scatter_add_(2, index, torch.ones_like(values))
    return total / size.clamp(min=1)


def _lab(images: Tensor) -> Tensor:
    """Convert sRGB in [0, 1] to CIELAB (D65)."""
    if images.shape[1] != 3:
        return images * 100  # the range of CIELAB's L
    rgb = images.clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]],
        device=images.device,
    )
    white = to_xyz.sum(dim=1).view(3, 1, 1)
    xyz = torch.stack([(row.view(3, 1, 1) * linear).sum(dim=1) for row in to_xyz], dim=1) / white
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-6) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], dim=1)
