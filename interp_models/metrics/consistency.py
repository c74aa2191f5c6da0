"""Consistency: whether a prototype finds the same part of the object in all images of its class."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.protocols import PrototypeModel
from interp_models.metrics.prototype_base import (
    PROTOTYPE_METRICS,
    Found,
    PrototypeMetric,
    near_parts,
    undefined_without,
)

ALWAYS = 0.8
"""Fraction of the images showing a part in which a consistent prototype must find it."""


@PROTOTYPE_METRICS.register("consistency")
class Consistency(PrototypeMetric):
    """Consistency: 1 if there is a part that the prototype finds in at least 80 % of the images of its class that show
    the part, else 0.

    A prototype finds a part if the part's key point lies in a square around the peak of its similarity map. The map is
    upsampled bicubically, and the side of the square is 72 / 224 of the image's side. Source: Huang et al., "Evaluation
    and Improvement of Interpretability for Self-Explainable Part-Prototype Networks", ICCV 2023, section 3.2.
    """

    keys = ("consistency",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"consistency": True}
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "consistency": "The fraction of prototypes that find the same part in at least 80 % of their class's images.",
    }
    hits: Tensor
    shown: Tensor

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__(model, part_names)
        zeros = torch.zeros(len(self.classes), len(part_names), device=self.classes.device)
        self.add_state("hits", zeros, dist_reduce_fx="sum")
        self.add_state("shown", zeros.clone(), dist_reduce_fx="sum")

    def update(self, model: PrototypeModel, found: Found) -> None:
        """Count the parts that each prototype finds in the images of its class."""
        assert found.parts is not None
        assert found.visible is not None
        image, prototype = self.pairs(found.label)
        visible, size = found.visible[image], (found.images.shape[-2], found.images.shape[-1])
        near = near_parts(found.maps[image, prototype], size, found.parts[image], visible)
        self.hits.index_add_(0, prototype, near.float())
        self.shown.index_add_(0, prototype, visible.float())

    def per_prototype(self) -> dict[str, Tensor]:
        """1 or 0 for every prototype; undefined if no image of its class shows a part."""
        always = (undefined_without(self.hits, self.shown) >= ALWAYS).any(dim=1)
        looked = (self.shown > 0).any(dim=1)
        return {"consistency": self.in_use(torch.where(looked, always.float(), torch.nan))}
