"""The patches of a data set's images that are nearest to prototypes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from interp_models.core.distributed import gathered
from interp_models.data.base import Sample
from interp_models.prototypes.distances import over_cells, squared_distances, unfolded


class Patches(NamedTuple):
    """The k nearest patches of each of P prototypes, at most one per image, the nearest first.

    Of equal distances the image that comes first in the data is nearer; within an image, the cell that does.
    """

    distance: Tensor
    """(P, k) squared L2; infinite where there are fewer than k."""
    image: Tensor
    """(P, k) int64, position of the image in its data set's split; -1 where there is none."""
    label: Tensor
    """(P, k) int64, class of the image; -1 where there is none."""
    cell: Tensor
    """(P, k) int64, number of the patch: of those in the image, row by row."""
    vector: Tensor
    """(P, k, D·a·b), the patch itself."""
    distances: Tensor
    """(P, k, h, w) squared L2, of each cell of the image, see `over_cells`."""


@torch.no_grad()
def nearest_patches(
    features: Callable[[Tensor], Tensor],
    batches: Iterable[Sample],
    prototypes: Tensor,
    allowed: Tensor | None = None,
    k: int = 1,
) -> Patches:
    """The nearest patches of all ranks' images, the same on every rank.

    One pass over the images; only prototypes that a batch's classes allow are compared with it, and nothing of an
    image is kept unless it is among the nearest.

    Args:
        features: images (B, 3, H, W) -> (B, D, h, w), in eval mode.
        batches: this rank's images, in the order of the data.
        prototypes: (P, D, a, b).
        allowed: (P, K) bool, the classes that a prototype's patches may come from; None allows all.
        k: patches per prototype.
    """
    device, size = prototypes.device, prototypes.shape[-2:]
    found: Patches | None = None
    for batch in batches:
        labels, indices = batch.label.to(device), batch.index.to(device)
        z = features(batch.image.to(device))
        fits = None if allowed is None else allowed[:, labels]  # (P, B)
        live = torch.arange(len(prototypes), device=device) if fits is None else fits.any(dim=1).nonzero()[:, 0]
        distances = squared_distances(z, prototypes[live])  # (B, L, h', w')
        if found is None:
            found = _none(len(prototypes), k, prototypes[0].numel(), distances)
        nearest, cell = distances.flatten(2).transpose(0, 1).min(dim=2)  # (L, B)
        if fits is not None:
            nearest = nearest.masked_fill(~fits[live], torch.inf)
        old = Patches(*(x[live] for x in found))
        both = torch.cat([old.distance, nearest], dim=1)  # (L, k + B)
        order = both.argsort(dim=1, stable=True)[:, :k]
        new, b = order >= k, (order - k).clamp(min=0)  # b: image of the batch
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
    """No patches yet."""
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
    """The nearest of what the ranks have found; where distances are equal, the first in the data."""
    everything = Patches(*(torch.cat(list(gathered(x)), dim=1) for x in found))
    by_index = everything.image.argsort(dim=1, stable=True)
    by_distance = everything.distance.gather(1, by_index).argsort(dim=1, stable=True)
    order = by_index.gather(1, by_distance)[:, :k]
    rows = torch.arange(len(order), device=order.device)[:, None]
    best = Patches(*(x[rows, order] for x in everything))
    missing = best.distance.isinf()
    return best._replace(image=best.image.masked_fill(missing, -1), label=best.label.masked_fill(missing, -1))


def without_duplicates(patches: Patches) -> Tensor:
    """Which of its k patches each prototype takes, (P,) int64, so that no two take one patch.

    The nearest pair of prototype and patch is settled first. -1 where all of a prototype's patches are taken.
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
