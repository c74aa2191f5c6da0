"""The push: replaces prototypes by the nearest patches of training images."""

import torch
from torch import Tensor
from tqdm import tqdm

from interp_models.core.boxes import activation_boxes
from interp_models.core.errors import InputError
from interp_models.data.module import DataModule
from interp_models.prototypes.boxes import receptive_spans
from interp_models.prototypes.search import Patches, nearest_patches, without_duplicates
from interp_models.prototypes.sources import Prototypical

FEW = 10
"""Candidates per prototype in the first search, if no two prototypes may take the same patch."""


@torch.no_grad()
def project(
    model: Prototypical,
    data: DataModule,
    allowed: Tensor | None = None,
    which: Tensor | None = None,
    unique: bool = False,
) -> None:
    """Replace prototypes by the nearest patches of un-augmented training images, and record their sources.

    The ranks share the images, and get the same prototypes. Of equal distances, the first patch in the data is taken.

    Args:
        model: in eval mode; its `prototypes` and `sources` change.
        data: provides the training images.
        allowed: (P, K) bool, the classes whose images a prototype may be taken from; None allows all.
        which: numbers of the prototypes to replace, int64; None replaces all.
        unique: whether no two prototypes may take the same patch.

    Raises:
        InputError: if a class has too few images for its prototypes. Nothing is changed then.
    """
    prototypes, sources, vectors = model.prototypes.data, model.sources, model.vectors
    which = torch.arange(len(prototypes), device=prototypes.device) if which is None else which
    allowed = None if allowed is None else allowed[which]
    most = 1
    if unique:  # at worst, every prototype that shares a class takes the nearest patch of this one first
        most = len(which) if allowed is None else int((allowed.float() @ allowed.float().T).bool().sum(dim=1).max())
    k, searching = 0, True
    while searching:  # a few candidates nearly always suffice; otherwise search again for more
        k = min(4 * k or FEW, most)
        loader = data.loader("train", augment=False)
        batches = tqdm(loader, desc="patches", unit="batch", leave=False, disable=not data.shows_progress)
        patches = nearest_patches(model.features, batches, vectors[which], allowed, k, model.cosine)
        choice = without_duplicates(patches) if unique else torch.zeros_like(which)
        left = choice < 0
        searching = k < most and bool(left.any()) and not bool((left & (patches.image[:, -1] < 0)).any())
    patches = Patches(*(x[torch.arange(len(which), device=which.device), choice] for x in patches))
    missing = ((choice < 0) | (patches.image < 0)).nonzero()[:, 0]
    if len(missing):
        label = 0 if allowed is None else int(allowed[missing[0]].int().argmax())
        raise InputError(
            f"class {data.classes[label]!r} has too few training images for its prototypes, "
            "or features that are not finite or all 0"
        )
    size, (high, wide) = (data.image_size, data.image_size), prototypes.shape[2:]
    across = patches.distances.shape[2] - wide + 1
    row, column = patches.cell // across, patches.cell % across
    noise = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=prototypes.dtype)
    rows, columns = receptive_spans(model.features, noise.to(prototypes.device))
    receptive = [columns[column, 0], rows[row, 0], columns[column + wide - 1, 1], rows[row + high - 1, 1]]
    prototypes[which] = patches.vector.view(-1, *prototypes.shape[1:])
    sources.image[which] = patches.image
    sources.cell[which] = torch.stack([row, column], dim=1)
    sources.receptive_box[which] = torch.stack(receptive, dim=1)
    sources.activation_box[which] = activation_boxes(model.similarity(patches.distances), size)
    sources.images.fill_(data.fingerprint("train", contents=True))
