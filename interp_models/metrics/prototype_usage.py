"""Number and diversity of the prototypes of a model."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.protocols import PrototypeModel
from interp_models.metrics.prototype_base import PROTOTYPE_METRICS, Found, PrototypeMetric

ZERO = 1e-3
"""Weights up to this absolute value count as 0."""


@PROTOTYPE_METRICS.register("prototype_usage")
class PrototypeUsage(PrototypeMetric):
    """Statistics of the prototypes and the last layer, without images.

    - `used`: the fraction of all prototypes that are not removed and, if the model has weights, have a weight above
      1e-3 for some class (Nauta et al., PIP-Net, CVPR 2023).
    - `duplicates`: the fraction of used prototypes that equal an earlier one. A push can make such copies.
    - `sparsity`: the fraction of weights with |w| <= 1e-3 in the last layer, over prototypes that are not removed.
    """

    keys = ("used", "duplicates", "sparsity")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"used": False, "duplicates": False, "sparsity": True}
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "used": "The fraction of prototypes that are not removed and count for some class.",
        "duplicates": "The fraction of used prototypes that equal an earlier one.",
        "sparsity": "The fraction of the last layer's weights that are 0.",
    }
    split, needs, zero_if_removed = None, (), ("used",)

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__(model, part_names)
        weights = model.prototype_weights
        self.used = self.classes.any(dim=1)
        self.sparsity = self.in_use(torch.full_like(self.used, torch.nan, dtype=torch.float32))
        if weights is not None:
            self.sparsity = self.in_use((weights.detach().abs() <= ZERO).float().mean(dim=0))
            self.used = self.used & (weights.detach() > ZERO).any(dim=0)
        _, group = torch.unique(_vectors(model)[self.used], dim=0, return_inverse=True)
        first = torch.full((len(group),), len(group), device=group.device)
        numbers = torch.arange(len(group), device=group.device)
        first.scatter_reduce_(0, group, numbers, "amin")
        self.repeats = torch.full_like(self.used, torch.nan, dtype=torch.float32)
        self.repeats[self.used] = (first[group] < numbers).float()

    def update(self, model: PrototypeModel, found: Found) -> None:
        """Do nothing: the metric uses no images."""

    def per_prototype(self) -> dict[str, Tensor]:
        """`used` and `duplicates` are 1 or 0; `sparsity` is a fraction of the prototype's weights."""
        return {"used": self.used.float(), "duplicates": self.repeats, "sparsity": self.sparsity}


@PROTOTYPE_METRICS.register("prototype_spread")
class PrototypeSpread(PrototypeMetric):
    """`spread`: the mean squared L2 distance between a prototype and the others. Removed prototypes do not count."""

    keys = ("spread",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"spread": True}
    percent = False
    legend: ClassVar[dict[str, str]] = {"spread": "The mean squared distance between two prototypes."}
    split, needs = None, ()

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__(model, part_names)
        used = self.classes.any(dim=1)
        vectors = _vectors(model)[used].flatten(1)
        # Σ_j ‖p_i - p_j‖² = n ‖p_i‖² + Σ_j ‖p_j‖² for centred vectors (Σ_j p_j = 0). It needs no matrix of pairs.
        centred = vectors - vectors.mean(dim=0)
        energy = centred.square().sum(dim=1)
        others = max(len(vectors) - 1, 1)
        self.distance = torch.full_like(used, torch.nan, dtype=vectors.dtype)
        self.distance[used] = (len(vectors) * energy + energy.sum()) / others if len(vectors) > 1 else torch.nan

    def update(self, model: PrototypeModel, found: Found) -> None:
        """Do nothing: the metric uses no images."""

    def per_prototype(self) -> dict[str, Tensor]:
        """Mean squared L2 distance of each prototype to the others."""
        return {"spread": self.distance}


def _vectors(model: PrototypeModel) -> Tensor:
    """The prototypes as patches are compared with them, (P, D, a, b); those of a model that does not tell, as they
    are."""
    found: Tensor = getattr(model, "vectors", model.prototypes)
    return found.detach()
