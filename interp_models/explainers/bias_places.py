"""Whether the maps whose biases FullGrad shows keep the positions of the image; see `places`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.batches import default_batch
from interp_models.explainers.places import EXPLAINED, order, replayed

NO_ORDER, TOO_FEW, FEW = 2, 4, 7
"""Of a map with so few rows or columns, cells see nearly all of the image. Nothing can be asked of 2; 3 and 4 must not
be in another arrangement; of up to 7, less order is asked."""
COARSE = 14
"""Most rows and columns of cells that are told apart; those of larger maps are averaged."""
ORDERED_AT_ALL = 0.2
"""Least order of few cells, and of cells whose form is known. Mirrored, shifted and shuffled ones have about 0."""
BETTER = 0.5
"""Order of 3 or 4 cells in another arrangement (mirrored, transposed, shifted by half, or with channels last) that
shows that they are in that arrangement."""


def readings(x: Tensor) -> list[Tensor]:
    """A map (B, C, H, W) and the same values with channels last: random mixtures of channels, averaged to at most
    `COARSE` cells along each axis."""
    found = []
    for read in (x, x.movedim(-1, 1)):
        weights = torch.randn(read.shape[1], 4, generator=torch.Generator().manual_seed(0)).to(x)
        mixed = torch.einsum("bchw,cd->bdhw", read, weights)
        found.append(F.adaptive_avg_pool2d(mixed, (min(mixed.shape[2], COARSE), min(mixed.shape[3], COARSE))))
    return found


def misplaced(image: Tensor, read: Callable[[Tensor], list[Tensor]]) -> str | None:
    """The reason why a bias map cannot be placed on the image; None if no problem was found.

    Args:
        image: one image, (1, C, H, W).
        read: computes the `readings` of all maps with a bias, one pair after the other, of images.
    """
    every = read(torch.cat([image, image]))
    if any(len(made) != 2 for made in every):
        return "has a layer whose output does not have one row per image"
    seen: dict[Any, list[Tensor]] = {}

    def passed(images: Tensor) -> list[Tensor]:
        parts = [read(some) for some in torch.split(images, default_batch(images))]
        return [torch.cat(same) for same in zip(*parts, strict=True)]

    def order_of(place: int, known: float, change: Callable[[Tensor], Tensor] = lambda x: x) -> float | None:
        grid = (every[place].shape[2], every[place].shape[3])
        every_map = replayed(passed, seen, grid)
        return order(image, grid, lambda images: change(every_map(images)[place]), known)

    for place in range(0, len(every), 2):
        least_cells = min(every[place].shape[2:])
        if least_cells <= NO_ORDER:
            continue
        least = EXPLAINED if least_cells > FEW else ORDERED_AT_ALL
        share = order_of(place, known=1.0)  # one image is often enough
        if share is None or share >= least:
            continue
        if least_cells > TOO_FEW:
            share = order_of(place, known=0.0) if share > 0 else share
            is_wrong = share is not None and share < least
        else:
            others = [order_of(place, 0.0, change) for change in _CHANGES] + [order_of(place + 1, 0.0)]
            is_wrong = max(other or 0.0 for other in others) > BETTER
        if is_wrong:
            return "has a layer that does not keep the positions of the image"
    return None


_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.flip(2),
    lambda x: x.flip(3),
    lambda x: x.flip(2, 3),
    lambda x: x.roll(-(x.shape[2] // 2), 2),
    lambda x: x.roll(-(x.shape[3] // 2), 3),
    lambda x: x.roll((-(x.shape[2] // 2), -(x.shape[3] // 2)), (2, 3)),
    lambda x: x.transpose(2, 3).reshape(x.shape),
)
