"""Purity: whether the patches most similar to a prototype show the same part."""

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.protocols import PrototypeModel
from interp_models.metrics.prototype_base import PROTOTYPE_METRICS, Found, PrototypeMetric, undefined_without

NEAREST = 10
"""Number of nearest images per prototype."""


class _Purity(PrototypeMetric, ABC):
    """Purity of a prototype: of its 10 most similar images, the fraction whose patch shows the part that it shows most
    often.

    The patch lies at the cell of the highest similarity. Its side is 1 / 7 of the image's side (32 pixels of 224), and
    its borders count. For each part, only images in which it is visible count. Left and right parts are one part.
    Source: Nauta et al., "PIP-Net: Patch-Based Intuitive Prototypes for Interpretable Image Classification", CVPR 2023,
    section 5.2.
    """

    similarity: Tensor
    index: Tensor
    shown: Tensor
    inside: Tensor

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__(model, part_names)
        self.sides = sides(part_names)
        shape, device = (len(self.classes), NEAREST), self.classes.device
        flags = torch.zeros(*shape, len(self.sides), dtype=torch.bool, device=device)
        # With dist_reduce_fx=None, ranks are stacked; `nearest` merges them.
        self.add_state("similarity", torch.full(shape, -torch.inf, device=device), dist_reduce_fx=None)
        self.add_state("index", torch.full(shape, -1, device=device), dist_reduce_fx=None)
        self.add_state("shown", flags, dist_reduce_fx=None)
        self.add_state("inside", flags.clone(), dist_reduce_fx=None)

    def update(self, model: PrototypeModel, found: Found) -> None:
        """Keep the images of the batch that are among the nearest so far."""
        assert found.parts is not None
        assert found.visible is not None
        rows, columns = found.maps.shape[-2:]
        similarity, cell = found.maps.float().flatten(2).max(dim=2)  # (B, P)
        low, high = patch(cell // columns, rows, found.images.shape[-2])
        left, right = patch(cell % columns, columns, found.images.shape[-1])
        x, y = found.parts[:, None, :, 0], found.parts[:, None, :, 1]  # (B, 1, J)
        inside = (x >= left[..., None]) & (x <= right[..., None]) & (y >= low[..., None]) & (y <= high[..., None])
        inside &= found.visible[:, None]
        shown = found.visible[:, None].expand_as(inside)
        flags = [torch.stack([x[..., list(side)].any(dim=2) for side in self.sides], dim=2) for x in (shown, inside)]
        batch = (similarity, found.number[:, None].expand_as(similarity), *flags)
        old = (self.similarity, self.index, self.shown, self.inside)
        joined = [torch.cat([mine, theirs.transpose(0, 1)], dim=1) for mine, theirs in zip(old, batch, strict=True)]
        self.similarity, self.index, self.shown, self.inside = nearest(*joined)

    def per_prototype(self) -> dict[str, Tensor]:
        """The purity of every prototype in [0, 1]; undefined if no part is visible in its nearest images."""
        states = (self.similarity, self.index, self.shown, self.inside)
        if self.similarity.dim() == 3:  # (ranks, P, 10)
            states = nearest(*(torch.cat(list(state), dim=1) for state in states))
        _, _, shown, inside = states
        shares = undefined_without(inside.sum(dim=1), shown.sum(dim=1))  # (P, parts)
        best = shares.nan_to_num(nan=-1.0).amax(dim=1)
        return {self.keys[0]: self.in_use(torch.where(best < 0, torch.nan, best))}


@PROTOTYPE_METRICS.register("purity")
class Purity(_Purity):
    """Purity on test images; see `_Purity`."""

    __doc__ = _Purity.__doc__  # `--help` and the tables show it
    keys = ("purity",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"purity": True}
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "purity": "The fraction of a prototype's 10 most similar test images whose patch shows its most frequent part.",
    }


@PROTOTYPE_METRICS.register("purity_train")
class PurityTrain(_Purity):
    """Purity on training images without augmentation, as `purity`."""

    split = "train"
    keys = ("purity_train",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"purity_train": True}
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "purity_train": "Purity on training images without augmentation.",
    }


def nearest(similarity: Tensor, index: Tensor, shown: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the nearest images of each prototype. Of equal similarities, the first image in the data is nearer."""
    by_index = index.argsort(dim=1, stable=True)
    by_similarity = similarity.gather(1, by_index).argsort(dim=1, descending=True, stable=True)
    order = by_index.gather(1, by_similarity)[:, :NEAREST]
    rows = torch.arange(len(order), device=order.device)[:, None]
    return similarity[rows, order], index[rows, order], shown[rows, order], inside[rows, order]


def patch(cell: Tensor, cells: int, size: int) -> tuple[Tensor, Tensor]:
    """First and last coordinate of a cell's patch along an axis of `cells` cells and `size` pixels.

    The first patch begins at the image's edge, and the last one ends at the other edge.

    >>> patch(torch.tensor([0, 6]), 7, 224)
    (tensor([  0., 192.]), tensor([ 32., 224.]))
    """
    side = size / 7
    first = cell * ((size - side) / (cells - 1)) if cells > 1 else (cell + 0.5) * size - side / 2
    return first, first + side


def sides(part_names: Sequence[str]) -> list[tuple[int, ...]]:
    """Group the numbers of parts whose names differ only in left and right.

    >>> sides(["beak", "left eye", "right eye"])
    [(0,), (1, 2)]
    """
    found: dict[str, list[int]] = {}
    for number, name in enumerate(part_names):
        found.setdefault(name.replace("left ", "").replace("right ", ""), []).append(number)
    return [tuple(numbers) for numbers in found.values()]
