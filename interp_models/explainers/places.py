"""Whether each cell of a feature map shows the part of the image at the same position.

Noise in a stripe of the image changes the cells of that stripe most, and others the less, the farther they are. If so,
one function of the distance explains nearly all changes.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST = 8
"""Most stripes of rows, and of columns, in which noise is tried."""
EXPLAINED = 0.8
"""Least share of the changes that the distance must explain."""
SURE, HOPELESS = 0.9, 0.4
"""Shares above and below which no further image is tried."""
ROUNDING = 1e-6
"""Changes that are no larger, relative to the largest value, are none."""
LEAST = 0.02
"""Least standard deviation of the logarithms of the changes."""


def order(image: Tensor, grid: tuple[int, int], read: Callable[[Tensor], Tensor], known: float = 0.0) -> float | None:
    """How well the distance between a stripe with noise and a cell explains the cell's change, from 0 to 1.

    Args:
        image: one image, (1, C, H, W).
        grid: rows h and columns w of the map.
        read: computes the feature maps (N, C, h, w) of images (N, C, H, W).
        known: what another reading of the same layer has; a reading that is worse than a sure one is left at that.

    Returns:
        The smaller share of variance (adjusted R²) of rows and columns; 0 if changes grow with the distance or hardly
        differ, or if the map knows nothing of a border of the image, see `edges`. None if the map does not change at
        all.
    """
    seen = read(edges(image, grid))
    change = (seen[1:] - seen[:1]).detach().abs().flatten(1).amax(dim=1)
    if float(change.max()) <= ROUNDING * float(seen.abs().max()):
        return None
    if float(change.min()) <= ROUNDING * float(change.max()):
        return 0.0  # the network crops the image
    logs: list[list[Tensor]] = []
    for base in _bases(image):
        features = read(probes(base, grid))
        change = (features[1:] - features[:1]).detach().abs().float().mean(dim=1)
        change = change.view(draws(grid), -1, *grid).mean(dim=0)
        if float(change.max()) <= ROUNDING * float(features.detach().abs().max()):
            return None
        parts = torch.split(change, [n for n in map(stripes, grid) if n > 1])
        logs.append([_logarithm(part) for part in parts])
        axes = [axis for axis in (0, 1) if stripes(grid[axis]) > 1]
        means = [torch.stack(some).nanmean(dim=0) for some in zip(*logs, strict=True)]
        share = min(_share(log, axis) for log, axis in zip(means, axes, strict=True))
        if not HOPELESS < share < SURE or share < SURE <= known:
            break
    return share


Made = TypeVar("Made")


def replayed(make: Callable[[Tensor], Made], seen: dict[Any, Made], key: Any) -> Callable[[Tensor], Made]:
    """A function as `make` whose n-th call returns what the n-th call of another one with the same key returned.

    `order` asks for the same images in the same order for every map of a grid, so that maps can share their passes.

    Args:
        make: makes something of images.
        seen: keeps what was made.
        key: what tells the images of the calls, such as the grid.
    """
    calls = itertools.count()

    def replay(images: Tensor) -> Made:
        number = (key, next(calls))
        if number not in seen:
            seen[number] = make(images)
        return seen[number]

    return replay


def _bases(image: Tensor) -> Iterator[Tensor]:
    """An image, mirrored and moved, so that what it shows is averaged out."""
    half = (image.shape[2] // 2, image.shape[3] // 2)
    for moved in (image, image.roll(half, dims=(2, 3))):
        for sides in ((), (2, 3), (2,), (3,)):
            yield moved.flip(sides) if sides else moved


def stripes(cells: int) -> int:
    """Number of stripes for a number of rows or columns of cells."""
    return cells if cells <= MOST else next((n for n in range(MOST, MOST // 2, -1) if cells % n == 0), MOST - 1)


def _ends(cells: int) -> list[int]:
    """The cells at which stripes begin and end."""
    return [round(stripe * cells / stripes(cells)) for stripe in range(stripes(cells) + 1)]


def edges(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image (1, C, H, W), noise, and copies of the image with noise in a border, for each of its sides: a quarter of
    a cell wide at the top and the left, and a cell at the bottom and the right, where strides may leave out nearly as
    much."""
    noise = _noise(image, torch.Generator().manual_seed(1))
    made = [image, noise]
    for axis in (0, 1):
        side, cells = image.shape[2 + axis], grid[axis]
        if cells > 1:
            width = -(-side // cells)
            made += [_put(image, noise, 2 + axis, 0, -(-side // (4 * cells)))]
            made += [_put(image, noise, 2 + axis, side - width, width)]
    return torch.cat(made)


def draws(grid: tuple[int, int]) -> int:
    """How often noise is drawn: few large cells see much of the image, so that their changes differ little."""
    count = max(map(stripes, grid))
    return max(1, (MOST if count > 3 else 2 * MOST) // count)


def probes(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image (1, C, H, W), and copies of it with noise in one stripe of rows or of columns each, `draws` times."""
    generator, made = torch.Generator().manual_seed(0), [image]
    for axis in (0, 1) * draws(grid):
        side, ends = image.shape[2 + axis], _ends(grid[axis])
        for pair in itertools.pairwise(ends) if len(ends) > 2 else ():
            first, last = (round(end * side / grid[axis]) for end in pair)
            made.append(_put(image, _noise(image, generator), 2 + axis, first, last - first))
    return torch.cat(made)


def _noise(image: Tensor, generator: torch.Generator) -> Tensor:
    """Noise in the range of an image."""
    low, high = (float(value) for value in torch.aminmax(image))
    low, high = (low, high) if low < high else (0.0, 1.0)
    return low + (high - low) * torch.rand(image.shape, generator=generator).to(image)


def _put(image: Tensor, noise: Tensor, axis: int, first: int, length: int) -> Tensor:
    """An image with noise in some rows or columns."""
    made = image.clone()
    made.narrow(axis, first, length).copy_(noise.narrow(axis, first, length))
    return made


def _logarithm(change: Tensor) -> Tensor:
    """Logarithms (stripes, h, w) of changes; NaN for cells that never change, as behind a ReLU."""
    log = (change + 1e-3 * change.mean()).log()
    return log.masked_fill(change.amax(dim=0) <= 1e-3 * change.mean(), torch.nan)


def _centred(log: Tensor) -> Tensor:
    """Logarithms (stripes, cells) without what a stripe changes everywhere, and what a cell changes always."""
    log = log - log.mean(dim=1, keepdim=True)
    return log - log.mean(dim=0, keepdim=True)


def _share(log: Tensor, axis: int) -> float:
    """The share of the variance of logarithms (stripes, h, w) that a function of the distance along an axis explains,
    over the cells that change."""
    count, changes = len(log), ~log.isnan().any(dim=0)
    if 4 * int(changes.sum()) < changes.numel():
        return 0.0
    y = _centred(log[:, changes]).double()
    if float(y.std()) < LEAST:
        return 0.0
    shares = []
    cells = log.shape[1 + axis]
    place = torch.arange(cells, device=log.device) + 0.5 - cells / 2
    centres = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(_ends(cells))], device=log.device)
    # Strides can move what a cell sees by half a cell; without padding, cells at the border lie up to a cell inside.
    for offset, inside in ((0.0, 0.0), (-0.5, 0.0), (0.5, 0.0), (0.0, 0.5), (0.0, 1.0)):
        own = (place + offset) * (1 - 2 * inside / cells) + cells / 2
        own = (own[:, None] if axis == 0 else own[None]).expand(log.shape[1:])[changes]
        distance = (centres[:, None] - own).abs() * count / cells
        if float((_centred(-distance).double() * y).sum()) <= 0:
            continue
        steps = (2 * distance + 1e-4).floor()
        x = torch.stack([_centred((steps == step).float()).flatten() for step in torch.unique(steps)], dim=1).double()
        left = y.flatten() - x @ (torch.linalg.pinv(x, rtol=1e-6) @ y.flatten())
        free, used = (count - 1) * max(1, y.shape[1] - 1), x.shape[1] - 1
        shares.append(1 - float(left @ left / (y * y).sum()) * free / max(1, free - used))
    return max([0.0, *shares])
