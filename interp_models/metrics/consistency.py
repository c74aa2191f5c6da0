"""Whether a prototype points at the same part of the object in all images of its class."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.scoring import PrototypeModel
from interp_models.metrics.prototype_base import (
    PROTOTYPE_METRICS,
    Found,
    PrototypeMetric,
    near_parts,
    undefined_without,
)

ALWAYS = 0.8
"""A part is pointed at if it is near the peak in so large a share of the images that show it."""


@PROTOTYPE_METRICS.register("consistency")
class Consistency(PrototypeMetric):
    """1 for a prototype that finds one and the same part in at least 80 % of the images of its class that show it.

    A part is found if its key point lies in a square of 72 / 224 of the image's side around the peak of the
    prototype's map, upsampled bicubically. Source: Huang et al., "Evaluation and Improvement of Interpretability for
    Self-Explainable Part-Prototype Networks", ICCV 2023, section 3.2.
    """

    keys = ("consistency",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"consistency": True}
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "consistency": "The share of prototypes that find one and the same part in 80 % of their class's images.",
    }
    hits: Tensor
    shown: Tensor

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__(model, part_names)
        zeros = torch.zeros(len(self.classes), len(part_names), device=self.classes.device)
        self.add_state("hits", zeros, dist_reduce_fx="sum")
        self.add_state("shown", zeros.clone(), dist_reduce_fx="sum")

    def update(self, model: PrototypeModel, found: Found) -> None:
        """Look at the images of a batch that a prototype is to be found in."""
        assert found.parts is not None
        assert found.visible is not None
        image, prototype = self.pairs(found.label)
        visible, size = found.visible[image], (found.images.shape[-2], found.images.shape[-1])
        near = near_parts(found.maps[image, prototype], size, found.parts[image], visible)
        self.hits.index_add_(0, prototype, near.float())
        self.shown.index_add_(0, prototype, visible.float())

    def per_prototype(self) -> dict[str, Tensor]:
        """1 or 0 for every prototype whose class has an image; see `compute`."""
        always = (undefined_without(self.hits, self.shown) >= ALWAYS).any(dim=1)
        looked = (self.shown > 0).any(dim=1)
        return {"consistency": self.in_use(torch.where(looked, always.float(), torch.nan))}
