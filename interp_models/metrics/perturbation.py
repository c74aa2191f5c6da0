"""Pure functions of maps and images, the building blocks of faithfulness metrics."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.batches import all_scores, scores_of_variants
from interp_models.core.errors import InputError
from interp_models.core.inputs import finite
from interp_models.core.maps import full_precision
from interp_models.core.scoring import ScoreFn, resolve_target


def check_maps(images: Tensor, maps: object) -> None:
    """Raise `InputError` unless maps are a finite tensor (B, h, w) with as many maps as images."""
    if not isinstance(maps, Tensor) or maps.dim() != 3 or len(maps) != len(images):
        found, hint = type(maps).__name__, "; torch.from_numpy makes a tensor of an array"
        if isinstance(maps, Tensor):
            found, hint = str(tuple(maps.shape)), ""
            if maps.dim() == 4 and maps.shape[1] == 1:
                hint = "; drop the channel: maps[:, 0]"
            elif maps.dim() == 2 and len(images) == 1:
                hint = "; write maps[None]"
        raise InputError(
            f"maps must be (batch, rows, columns) for {len(images)} images (one map per image); got {found}{hint}"
        )
    if not bool(torch.isfinite(maps).all()):
        raise InputError("a map holds NaN or infinite values")


def check_grid(images: Tensor, maps: Tensor) -> None:
    """Raise `InputError` if maps have more rows or columns than the images have pixels."""
    (rows, columns), (height, width) = maps.shape[-2:], images.shape[-2:]
    if rows > height or columns > width:
        raise InputError(f"a grid of {rows} x {columns} cells is finer than images of {height} x {width} pixels")


def to_grid(maps: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Resample maps (B, h, w) to a grid: area mean along an axis that gets coarser, bilinear along one that gets finer.

    None returns the maps unchanged.

    >>> to_grid(torch.tensor([[[1.0, 3.0]]]), (1, 1)).tolist()
    [[[2.0]]]
    """
    if grid is None or maps.shape[-2:] == grid:
        return maps
    coarser = (min(grid[0], maps.shape[-2]), min(grid[1], maps.shape[-1]))
    averaged = F.interpolate(maps[:, None], size=coarser, mode="area")
    return F.interpolate(averaged, size=grid, mode="bilinear", align_corners=False)[:, 0]


def min_max(maps: Tensor) -> Tensor:
    """Min-max normalise each map (B, h, w) to [0, 1]; a constant map becomes 0."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1.0)


def is_constant(maps: Tensor) -> Tensor:
    """Whether each map is constant up to float32 noise: values differ by at most 1e-6 of the largest. (B,) bool."""
    low, high = torch.aminmax(maps.flatten(1), dim=1)
    return high - low <= 1e-6 * torch.maximum(high.abs(), low.abs())


def ranks(maps: Tensor) -> Tensor:
    """Rank of every cell, int64 (B, h, w). 0 is the most important; of equal cells the first comes first."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).view(maps.shape)


def gaussian(images: Tensor) -> Tensor:
    """Gaussian blur with an 11 × 11 kernel and σ = 5 (as in RISE), with mirrored border.

    The border of a side of less than 6 pixels is mirrored several times.
    """
    from torchvision.transforms.v2.functional import gaussian_blur  # only insertion needs it

    height, width = images.shape[-2:]
    above, left = (5 if side < 6 else 0 for side in (height, width))
    padded = images
    if above or left:
        rows, columns = (_mirrored(*pair).to(images.device) for pair in ((height, above), (width, left)))
        padded = images[..., rows, :][..., columns]
    blurred: Tensor = gaussian_blur(padded, kernel_size=[11, 11], sigma=[5.0, 5.0])
    return blurred[..., above : above + height, left : left + width]


def _mirrored(side: int, border: int) -> Tensor:
    """Positions along a side that is mirrored at both ends, with a border.

    >>> _mirrored(3, 3).tolist(), _mirrored(1, 2).tolist()
    ([1, 2, 1, 0, 1, 2, 1, 0, 1], [0, 0, 0, 0, 0])
    """
    period = max(1, 2 * (side - 1))
    places = torch.arange(-border, side + border) % period
    return torch.minimum(places, period - places) if side > 1 else torch.zeros_like(places)


def rise_blur(images: Tensor) -> Tensor:
    """The blur of RISE's code: an 11 × 11 kernel with zeros beyond the border.

    Its weights are those of a Gaussian with σ = 5 that is folded back at the kernel's ends, so that they add up to 1.
    """
    places = torch.arange(-20, 21)  # four σ
    taps = torch.exp(-(places.double().square()) / 50)
    kernel = torch.zeros(11, dtype=torch.float64)
    for row in range(11):
        at = (row + places) % 22
        folded = torch.minimum(at, 21 - at)  # d c b a | a b c d | d c b a
        kernel[row] = (taps * (folded == 5)).sum() / taps.sum()
    weights = kernel.to(images).view(1, 1, 11, 1).expand(images.shape[1], 1, 11, 1)
    with full_precision(images):
        down = F.conv2d(images, weights, padding=(5, 0), groups=images.shape[1])
        return F.conv2d(down, weights.transpose(2, 3), padding=(0, 5), groups=images.shape[1])


def box_blur(images: Tensor) -> Tensor:
    """Box blur with the side max(H // 5, 9), made odd, and zeros beyond the border (as in saliency-maps-metrics)."""
    side = max(images.shape[-2] // 5, 9) // 2 * 2 + 1
    # The box is separable: 2 · side instead of side² operations per pixel.
    rows = F.avg_pool2d(images, (side, 1), stride=1, padding=(side // 2, 0))
    return F.avg_pool2d(rows, (1, side), stride=1, padding=(0, side // 2))


def score_all(score_fn: ScoreFn, images: Tensor, target: Tensor, batch: int | None = None) -> Tensor:
    """The target's score of each image (B,), computed a few images at a time."""
    scores = finite(all_scores(score_fn, images, batch))
    return scores.gather(1, resolve_target(target, scores)[:, None])[:, 0]


def curve(
    score_fn: ScoreFn,
    start: Tensor,
    end: Tensor,
    cell_ranks: Tensor,
    counts: Sequence[int],
    target: Tensor,
    batch: int | None = None,
) -> Tensor:
    """Scores (B, T) of images that turn from `start` into `end`, cell by cell.

    Args:
        score_fn: images -> class probabilities.
        start: images (B, 3, H, W).
        end: images (B, 3, H, W).
        cell_ranks: rank of each cell (B, h, w), as from `ranks`.
        counts: at each of the T points, the number of cells that show `end`; those of the lowest ranks.
        target: class of each image (B,).
        batch: images per forward pass; None chooses it for the device.
    """
    return steps(score_fn, start, end, cell_ranks, [0] * len(counts), counts, target, batch)


def steps(
    score_fn: ScoreFn,
    start: Tensor,
    end: Tensor,
    cell_ranks: Tensor,
    first: Sequence[int],
    last: Sequence[int],
    target: Tensor,
    batch: int | None = None,
) -> Tensor:
    """Scores (B, T) of images `start` of which some cells show `end`.

    Args:
        score_fn: images -> class probabilities.
        start: images (B, 3, H, W).
        end: images (B, 3, H, W).
        cell_ranks: rank of each cell (B, h, w), as from `ranks`.
        first: at each of the T points, the lowest rank of the cells that show `end`.
        last: at each point, the first rank of those that do not.
        target: class of each image (B,).
        batch: images per forward pass; None chooses it for the device.
    """
    pixel_ranks = to_pixels(cell_ranks.int(), (start.shape[-2], start.shape[-1]))  # (B, H, W)
    low, high = torch.as_tensor(first, device=start.device), torch.as_tensor(last, device=start.device)

    def mixed(b: Tensor, t: Tensor) -> Tensor:
        own = pixel_ranks[b]
        turned = (own < high[t][:, None, None]) & (own >= low[t][:, None, None])  # (m, H, W)
        return torch.where(turned[:, None], end[b], start[b])

    return scores_of_variants(score_fn, start, len(low), mixed, target, batch)


def without(
    score_fn: ScoreFn,
    images: Tensor,
    fill: Tensor,
    cells: Tensor,
    target: Tensor,
    batch: int | None = None,
) -> Tensor:
    """Scores (B, T) of images without some cells, the same of every image or others of each.

    Args:
        score_fn: images -> class scores.
        images: (B, 3, H, W).
        fill: what removed cells show: an image (B, 3, H, W), or of one colour (1, 3, 1, 1).
        cells: whether each cell is removed, (T, h, w) or (B, T, h, w) bool.
        target: class of each image (B,).
        batch: images per forward pass; None chooses it for the device.
    """
    size = (images.shape[-2], images.shape[-1])

    def mixed(b: Tensor, t: Tensor) -> Tensor:
        removed = to_pixels(cells[t] if cells.dim() == 3 else cells[b, t], size)  # (m, H, W)
        return torch.where(removed[:, None], fill[b] if len(fill) == len(images) else fill, images[b])

    return scores_of_variants(score_fn, images, cells.shape[-3], mixed, target, batch)


def to_pixels(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Values of cells (..., h, w) for every pixel, (..., H, W): each pixel takes its nearest cell."""
    (rows, columns), (height, width) = cells.shape[-2:], size
    y = torch.arange(height, device=cells.device) * rows // height
    x = torch.arange(width, device=cells.device) * columns // width
    return cells[..., y, :][..., x]


def exact(values: Tensor) -> Tensor:
    """Move values to the CPU as float64, which not every device has."""
    return values.cpu().double()


def trapezoid(scores: Tensor, fractions: Sequence[float]) -> Tensor:
    """Area (B,) under curves (B, T) over fractions (T,) by the trapezoidal rule; float64 on the CPU."""
    return torch.trapezoid(exact(scores), torch.as_tensor(fractions, dtype=torch.float64), dim=1)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation (B,) of rows (B, T); float64 on the CPU. NaN if a row is constant or has one value only."""
    a, b = exact(a), exact(b)
    constant = (a.amin(dim=1) == a.amax(dim=1)) | (b.amin(dim=1) == b.amax(dim=1))
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    r = (a * b).sum(dim=1) / (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()
    return torch.where(constant, torch.nan, r.clamp(-1, 1))


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman correlation (B,) of rows (B, T); float64 on the CPU. Equal values have their mean rank.

    NaN as `pearson`.

    >>> spearman(torch.tensor([[1.0, 5.0, 5.0]]), torch.tensor([[0.1, 0.2, 0.3]])).tolist()
    [0.8660254037844387]
    """
    return pearson(mean_ranks(a), mean_ranks(b))


def mean_ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row (B, T), from 1 on for the lowest; equal values share their mean rank; float64."""
    rows = exact(values)
    below = (rows[:, None] < rows[:, :, None]).sum(dim=2)
    equal = (rows[:, None] == rows[:, :, None]).sum(dim=2)
    return below + (equal + 1) / 2.0


def mean_of_groups(sorted_values: Tensor, counts: Sequence[int]) -> Tensor:
    """Means (B, T-1) of the values (B, cells) between consecutive counts; float64 on the CPU."""
    total = F.pad(exact(sorted_values).cumsum(dim=1), (1, 0))
    ends = torch.as_tensor(counts)
    return total[:, ends].diff(dim=1) / ends.diff()
