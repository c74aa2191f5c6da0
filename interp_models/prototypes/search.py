"""Search for the patches in a data set that are nearest to prototypes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.distributed import gathered
from interp_models.data.base import Sample
from interp_models.prototypes.distances import over_cells, squared_distances, unfolded


class Patches(NamedTuple):
    """The k nearest patches of each of P prototypes, the nearest first, at most one per image.

    Of equal distances, the first image in the data is nearer; within an image, the first cell.
    """

    distance: Tensor
    """Squared L2 distance, (P, k); infinite where there are fewer than k patches."""
    image: Tensor
    """Position of the image in the split of its data set, (P, k) int64; -1 where there is no patch."""
    label: Tensor
    """Class of the image, (P, k) int64; -1 where there is no patch."""
    cell: Tensor
    """Number of the patch in its image, row by row, (P, k) int64."""
    vector: Tensor
    """The patch itself, (P, k, D·a·b)."""
    distances: Tensor
    """Squared L2 distances of all cells of the image, (P, k, h, w), see `over_cells`."""


@torch.no_grad()
def nearest_patches(
    features: Callable[[Tensor], Tensor],
    batches: Iterable[Sample],
    prototypes: Tensor,
    allowed: Tensor | None = None,
    k: int = 1,
    cosine: bool = False,
) -> Patches:
    """Search the images of all ranks for the nearest patches. Every rank gets the same result.

    It takes one pass over the images. Memory does not grow with their number.

    Args:
        features: images (B, 3, H, W) -> (B, D, h, w), in eval mode.
        batches: this rank's images, in the order of the data.
        prototypes: (P, D, a, b).
        allowed: (P, K) bool, the classes whose images a prototype may be taken from; None allows all.
        k: number of patches per prototype.
        cosine: see `squared_distances`. Patches with a cell of zeros are not taken.
    """
    device, size = prototypes.device, prototypes.shape[-2:]
    found: Patches | None = None
    for batch in batches:
        labels, indices = batch.label.to(device), batch.index.to(device)
        z = features(batch.image.to(device))
        fits = None if allowed is None else allowed[:, labels]  # (P, B)
        live = torch.arange(len(prototypes), device=device) if fits is None else fits.any(dim=1).nonzero()[:, 0]
        distances = squared_distances(z, prototypes[live], cosine)  # (B, L, h', w')
        if found is None:
            found = _none(len(prototypes), k, prototypes[0].numel(), distances)
        possible = distances
        if cosine:  # a cell without a direction cannot be a prototype: it would be as far from everything
            blank = (z == 0).all(dim=1, keepdim=True).float()
            possible = distances.masked_fill(F.max_pool2d(blank, (size[0], size[1]), stride=1) > 0, torch.inf)
        nearest, cell = possible.flatten(2).transpose(0, 1).min(dim=2)  # (L, B)
        if fits is not None:
            nearest = nearest.masked_fill(~fits[live], torch.inf)
        old = Patches(*(x[live] for x in found))
        both = torch.cat([old.distance, nearest], dim=1)  # (L, k + B)
        order = both.argsort(dim=1, stable=True)[:, :k]
        new, b = order >= k, (order - k).clamp(min=0)  # b: position in the batch
        at = cell.gather(1, b)
        vectors = unfolded(z, size).transpose(1, 2)  # (B, h'·w', D·a·b)
        chosen = Patches(
            both.gather(1, order),
            indices[b],
            labels[b],
            at,
            vectors[b, at],
            distances[b, torch.arange(len(live), device=device)[:, None]],
        )
        kept = order.clamp(max=k - 1)
        for state, mine, theirs in zip(found, old, chosen, strict=True):
            rows = torch.arange(len(live), device=device)[:, None]
            pick = new.view(*new.shape, *[1] * (mine.dim() - 2))
            state[live] = torch.where(pick, theirs, mine[rows, kept])
    assert found is not None, "no images"
    found = _over_ranks(found, k)
    return found._replace(distances=over_cells(found.distances, prototypes.shape))


def _none(prototypes: int, k: int, values: int, distances: Tensor) -> Patches:
    """The state before the first batch: no patches."""
    shape = (prototypes, k)
    image, label, cell = (distances.new_full(shape, -1, dtype=torch.int64) for _ in range(3))
    return Patches(
        distances.new_full(shape, torch.inf),
        image,
        label,
        cell,
        distances.new_zeros(*shape, values),
        distances.new_zeros(*shape, *distances.shape[-2:]),
    )


def _over_ranks(found: Patches, k: int) -> Patches:
    """Merge the patches of all ranks. Of equal distances, the first image in the data is nearer."""
    everything = Patches(*(torch.cat(list(gathered(x)), dim=1) for x in found))
    by_index = everything.image.argsort(dim=1, stable=True)
    by_distance = everything.distance.gather(1, by_index).argsort(dim=1, stable=True)
    order = by_index.gather(1, by_distance)[:, :k]
    rows = torch.arange(len(order), device=order.device)[:, None]
    best = Patches(*(x[rows, order] for x in everything))
    missing = best.distance.isinf()
    return best._replace(image=best.image.masked_fill(missing, -1), label=best.label.masked_fill(missing, -1))


def without_duplicates(patches: Patches) -> Tensor:
    """Assign to each prototype one of its k patches, so that no two prototypes have the same one.

    Pairs of a prototype and a patch are assigned in the order of their distance.

    Returns:
        For each prototype the number of its patch, (P,) int64; -1 if other prototypes took all of its patches.
    """
    taken: set[tuple[int, int]] = set()
    choice = [-1] * len(patches.distance)
    pairs = patches.distance.flatten().argsort(stable=True).tolist()
    k = patches.distance.shape[1]
    image, cell = patches.image.tolist(), patches.cell.tolist()
    for pair in pairs:
        p, j = divmod(pair, k)
        patch = (image[p][j], cell[p][j])
        if choice[p] < 0 and patch[0] >= 0 and patch not in taken:
            choice[p] = j
            taken.add(patch)
    return torch.tensor(choice, device=patches.distance.device)
