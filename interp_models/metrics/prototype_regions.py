"""Distinctiveness and comprehensiveness: whether the prototypes of a class look at different parts, and at all."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.maps import enlarged
from interp_models.core.protocols import PrototypeModel
from interp_models.metrics.prototype_base import (
    PROTOTYPE_METRICS,
    Found,
    PrototypeMetric,
    peaks,
    undefined_without,
)

SIDE = 72 / 224
"""Side of a prototype's square, as a fraction of the image's."""
HIGH = 0.6
"""A pixel belongs to a prototype's region if its activation is at least this fraction of the highest one."""


@PROTOTYPE_METRICS.register("distinctiveness")
class Distinctiveness(PrototypeMetric):
    """`distinctiveness`: 1 - the mean intersection over union of a prototype's square with those of the other
    prototypes of the class, in the images of the class. In [0, 1]; higher is better.

    A square is centred at the peak of the map, and its side is 72 / 224 of the image's side. Prototypes of classes with
    a single one have no value.
    """

    needs = ()
    keys = ("distinctiveness",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"distinctiveness": True}
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "distinctiveness": "How little the places overlap at which the prototypes of a class look."
    }
    overlap: Tensor
    pairs_seen: Tensor

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__(model, part_names)
        zeros = torch.zeros(len(self.classes), device=self.classes.device, dtype=torch.float64)
        self.add_state("overlap", zeros, dist_reduce_fx="sum")
        self.add_state("pairs_seen", zeros.clone(), dist_reduce_fx="sum")

    def update(self, model: PrototypeModel, found: Found) -> None:
        """Compare the squares of the prototypes of each image's class."""
        size = (found.images.shape[-2], found.images.shape[-1])
        side = torch.tensor([size[1], size[0]], device=found.maps.device) * SIDE
        for maps, label in zip(found.maps, found.label.tolist(), strict=True):
            own = self.classes[:, label].nonzero()[:, 0]
            if len(own) < 2:
                continue
            places = peaks(maps[own], size).float()
            common = (side - (places[:, None] - places).abs()).clamp(min=0).prod(dim=2)  # (n, n)
            overlap = common / (2 * side.prod() - common)
            self.overlap.index_add_(0, own, (overlap.sum(dim=1) - overlap.diagonal()).double())
            others = torch.full((len(own),), len(own) - 1.0, dtype=torch.float64, device=own.device)
            self.pairs_seen.index_add_(0, own, others)

    def per_prototype(self) -> dict[str, Tensor]:
        """The distinctiveness of every prototype."""
        return {"distinctiveness": self.in_use(1 - undefined_without(self.overlap, self.pairs_seen)).float()}


@PROTOTYPE_METRICS.register("comprehensiveness")
class Comprehensiveness(PrototypeMetric):
    """`comprehensiveness`: intersection over union of the object's mask with the union of the regions of the prototypes
    of the image's class. In [0, 1]; higher is better.

    A region are the pixels of the upsampled map with at least 0.6 of its highest activation. From a map with negative
    values, such as -d of `activation=linear`, its lowest value is subtracted first. A prototype's value is the
    mean over the images of its class that have a mask.
    """

    needs = ("mask",)
    keys = ("comprehensiveness",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"comprehensiveness": True}
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "comprehensiveness": "How well the regions of a class's prototypes together cover the object and nothing else."
    }
    covered: Tensor
    images: Tensor

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__(model, part_names)
        zeros = torch.zeros(len(self.classes), device=self.classes.device, dtype=torch.float64)
        self.add_state("covered", zeros, dist_reduce_fx="sum")
        self.add_state("images", zeros.clone(), dist_reduce_fx="sum")

    def update(self, model: PrototypeModel, found: Found) -> None:
        """Compare the regions with the masks."""
        assert found.mask is not None
        for maps, label, mask in zip(found.maps, found.label.tolist(), found.mask, strict=True):
            own = self.classes[:, label].nonzero()[:, 0]
            if not len(own) or not bool(mask.any()):
                continue
            large = enlarged(maps[own], (mask.shape[0], mask.shape[1]))
            large = large - large.amin(dim=(1, 2), keepdim=True).clamp(max=0)
            region = (large >= HIGH * large.amax(dim=(1, 2), keepdim=True)).any(dim=0)
            share = (region & mask).sum() / (region | mask).sum()
            self.covered.index_add_(0, own, share.double().expand(len(own)))
            self.images.index_add_(0, own, torch.ones(len(own), dtype=torch.float64, device=own.device))

    def per_prototype(self) -> dict[str, Tensor]:
        """The comprehensiveness of the class of every prototype."""
        return {"comprehensiveness": self.in_use(undefined_without(self.covered, self.images)).float()}
