"""Prototypes that are patches of training images: how they become that, and what is known of where they come from."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from interp_models.data.module import DataModule
from interp_models.errors import InputError
from interp_models.maps import upsampled
from interp_models.outputs import InterpOutput
from interp_models.prototypes import Patches, nearest_patches, without_duplicates
from interp_models.scoring import PrototypeModel

Size = tuple[int, int]
"""Height and width."""
FEW = 10
"""Patches that are kept for each prototype at first, where no two may take the same one."""


def activation_boxes(activations: Tensor, size: Size, percentile: float = 95.0) -> Tensor:
    """The smallest box around all pixels that activate as much as the upper `100 - percentile` % do.

    Args:
        activations: (P, h, w), upsampled bicubically to the image.
        size: height and width of the image.
        percentile: of the pixels of the image (paper: 95).

    Returns:
        (P, 4) int64, XYXY in pixels, the ends exclusive.
    """
    boxes = []
    # Pixels not below the interpolated percentile are those not below the next value above it.
    count = size[0] * size[1]
    position = min(int(percentile / 100 * (count - 1) + 1 - 1e-9), count - 1)
    for large in upsampled(activations, size):
        thresholds = np.partition(large.flatten(1).numpy(), position, axis=1)[:, position]
        spans = []
        for axis in (large.amax(dim=1), large.amax(dim=2)):  # columns, rows
            high = axis >= torch.from_numpy(thresholds)[:, None]
            spans += [high.int().argmax(dim=1), high.shape[1] - high.flip(1).int().argmax(dim=1)]
        boxes.append(torch.stack([spans[0], spans[2], spans[1], spans[3]], dim=1))
    return torch.cat(boxes).to(activations.device)


def receptive_spans(features: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns of pixels that a cell of the features is made of.

    Found by the gradient, which is exact for any network whose activations do not all vanish: cells of one row share
    their rows of pixels, and cells of one column their columns, so those on the diagonal tell all. A network that
    pools over the whole image gives the whole image.

    Args:
        features: images -> (B, D, h, w).
        image: (1, 3, H, W), such as noise.

    Returns:
        rows (h, 2) and columns (w, 2), first and last + 1, int64.
    """
    with torch.enable_grad():
        image = image.detach().requires_grad_(True)
        z = features(image)[0].abs().sum(dim=0)  # (h, w)
        count = [z.shape[0], z.shape[1]]
        spans = [torch.zeros(n, 2, dtype=torch.int64) for n in count]
        for number in range(max(count)):
            cell = [min(number, n - 1) for n in count]
            (gradient,) = torch.autograd.grad(z[cell[0], cell[1]], image, retain_graph=True)
            seen = (gradient[0] != 0).any(dim=0).cpu()
            for axis in (0, 1):
                pixels = seen.any(dim=1 - axis).nonzero()[:, 0]
                if len(pixels):
                    spans[axis][cell[axis]] = torch.stack([pixels[0], pixels[-1] + 1])
    return spans[0].to(image.device), spans[1].to(image.device)


class Sources(nn.Module):
    """Where prototypes that are patches of training images come from, in buffers; they lie in checkpoints.

    Boxes are XYXY in pixels after the test transform, the ends exclusive.
    """

    image: Tensor
    """(P,) int64, position of the image in the training split; -1 for a prototype that is no patch."""
    cell: Tensor
    """(P, 2) int64, row and column of the patch's first cell."""
    receptive_box: Tensor
    """(P, 4) int64, around the pixels that the patch is made of."""
    activation_box: Tensor
    """(P, 4) int64, around the upper 5 % of the image's pixels by activation."""
    images: Tensor
    """The fingerprint of the training images, () int64; -1 before any prototype was a patch."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("image", torch.full((prototypes,), -1))
        self.register_buffer("cell", torch.zeros(prototypes, 2, dtype=torch.long))
        self.register_buffer("receptive_box", torch.zeros(prototypes, 4, dtype=torch.long))
        self.register_buffer("activation_box", torch.zeros(prototypes, 4, dtype=torch.long))
        self.register_buffer("images", torch.tensor(-1))


class Match(NamedTuple):
    """What one prototype has to do with the prediction of one image."""

    prototype: int
    box: tuple[int, int, int, int] | None
    """Where it was found, XYXY in pixels; None if it was not."""
    text: str
    """What that counts for."""


class Reading(NamedTuple):
    """Why one image is of its class."""

    matches: list[Match]
    """The first one first."""
    total: str
    """What they come to."""


class Prototypical(PrototypeModel, Protocol):
    """A model whose prototypes can be shown and judged."""

    sources: Sources

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> what prototypes are compared with, (B, D, h, w)."""

    def similarity(self, distances: Tensor) -> Tensor:
        """Squared L2 distances -> similarities."""

    def readings(self, output: InterpOutput, targets: Tensor, image_size: Size, n: int | None = None) -> list[Reading]:
        """Why each image is of its target class, by at most n prototypes, or as many as the model thinks fit."""

    def prototype_sheets(self, classes: Sequence[str]) -> dict[str, list[int]]:
        """Numbers of the prototypes that are shown together, by a name for a file."""


def has_prototypes(model: Any) -> TypeGuard[Prototypical]:
    """Whether a model has what `Prototypical` asks for."""
    return all(hasattr(model, name) for name in ("sources", "readings", "prototype_sheets"))


def needs_every_class(model: Any) -> bool:
    """Whether prototypes belong to classes, so that a class without a training image leaves some without a patch."""
    return has_prototypes(model) and getattr(model, "class_specific", True)


@torch.no_grad()
def project(
    prototypes: Tensor,
    sources: Sources,
    features: Callable[[Tensor], Tensor],
    similarity: Callable[[Tensor], Tensor],
    data: DataModule,
    allowed: Tensor | None = None,
    which: Tensor | None = None,
    unique: bool = False,
) -> None:
    """Replace prototypes by the nearest patches of un-augmented training images, and record where they come from.

    The same on all ranks: the images are shared out among them. Of equal distances the first in the data wins.

    Args:
        prototypes: (P, D, a, b), changed in place.
        sources: of the prototypes, changed in place.
        features: images -> (B, D, h, w), in eval mode.
        similarity: squared distances -> activations, for the boxes.
        data: gives the images.
        allowed: (P, K) bool, the classes that a prototype's patches may come from; None allows all.
        which: numbers of the prototypes to replace, int64; None replaces all.
        unique: no patch goes to two prototypes.

    Raises:
        InputError: if there are too few images, naming a class; nothing is changed then.
    """
    which = torch.arange(len(prototypes), device=prototypes.device) if which is None else which
    allowed = None if allowed is None else allowed[which]
    most = 1
    if unique:  # a prototype's patches may all be taken by others that may take them too
        most = len(which) if allowed is None else int((allowed.float() @ allowed.float().T).bool().sum(dim=1).max())
    k, searching = 0, True
    while searching:  # the few that suffice nearly always, then more
        k = min(4 * k or FEW, most)
        loader = data.loader("train", augment=False)
        batches = tqdm(loader, desc="patches", unit="batch", leave=False, disable=not data.shows_progress)
        patches = nearest_patches(features, batches, prototypes[which], allowed, k)
        choice = without_duplicates(patches) if unique else torch.zeros_like(which)
        left = choice < 0
        searching = k < most and bool(left.any()) and not bool((left & (patches.image[:, -1] < 0)).any())
    patches = Patches(*(x[torch.arange(len(which), device=which.device), choice] for x in patches))
    missing = ((choice < 0) | (patches.image < 0)).nonzero()[:, 0]
    if len(missing):
        label = 0 if allowed is None else int(allowed[missing[0]].int().argmax())
        raise InputError(
            f"class {data.classes[label]!r} has too few training images for its prototypes, "
            "or features that are not finite"
        )
    size, (high, wide) = (data.image_size, data.image_size), prototypes.shape[2:]
    across = patches.distances.shape[2] - wide + 1
    row, column = patches.cell // across, patches.cell % across
    noise = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=prototypes.dtype)
    rows, columns = receptive_spans(features, noise.to(prototypes.device))
    receptive = [columns[column, 0], rows[row, 0], columns[column + wide - 1, 1], rows[row + high - 1, 1]]
    prototypes[which] = patches.vector.view(-1, *prototypes.shape[1:])
    sources.image[which] = patches.image
    sources.cell[which] = torch.stack([row, column], dim=1)
    sources.receptive_box[which] = torch.stack(receptive, dim=1)
    sources.activation_box[which] = activation_boxes(similarity(patches.distances), size)
    sources.images.fill_(data.fingerprint("train", contents=True))
