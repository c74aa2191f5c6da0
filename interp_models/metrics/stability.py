"""Stability: whether a prototype finds the same parts of an image when slight noise is added."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.protocols import PrototypeModel
from interp_models.core.rng import seed_of
from interp_models.metrics.prototype_base import (
    PROTOTYPE_METRICS,
    Found,
    PrototypeMetric,
    near_parts,
    undefined_without,
)

SIGMA, MOST = 0.2, 0.25
"""Standard deviation and limit of the noise, in units of the standard deviation of ImageNet's pixels."""
IMAGENET_STD = (0.229, 0.224, 0.225)


@PROTOTYPE_METRICS.register("stability")
class Stability(PrototypeMetric):
    """Stability: the fraction of the images of its class in which a prototype finds the same parts with and without
    noise.

    The noise is normal with σ = 0.2, clipped at ±0.25, in units of the standard deviation of ImageNet's colours. It is
    the same for every model: it depends on the index of the image only. A prototype finds a part as in `Consistency`.
    Source: Huang et al., ICCV 2023, section 3.3.
    """

    keys = ("stability",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"stability": True}
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "stability": "The fraction of their class's images in which prototypes find the same parts with noise added.",
    }
    same: Tensor
    images: Tensor

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__(model, part_names)
        zeros = torch.zeros(len(self.classes), device=self.classes.device)
        self.add_state("same", zeros, dist_reduce_fx="sum")
        self.add_state("images", zeros.clone(), dist_reduce_fx="sum")

    def update(self, model: PrototypeModel, found: Found) -> None:
        """Compare the parts that each prototype finds in the images of its class, with and without noise."""
        assert found.parts is not None
        assert found.visible is not None
        image, prototype = self.pairs(found.label)
        size = (found.images.shape[-2], found.images.shape[-1])
        noisy = model(found.images + noise(found.number, size).to(found.images)).maps
        parts, visible = found.parts[image], found.visible[image]
        before, after = (near_parts(maps[image, prototype], size, parts, visible) for maps in (found.maps, noisy))
        self.same.index_add_(0, prototype, (before == after).all(dim=1).float())
        self.images.index_add_(0, prototype, torch.ones_like(prototype, dtype=torch.float32))

    def per_prototype(self) -> dict[str, Tensor]:
        """The stability of every prototype in [0, 1]; undefined if its class has no image."""
        return {"stability": self.in_use(undefined_without(self.same, self.images))}


def noise(index: Tensor, size: tuple[int, int]) -> Tensor:
    """The noise (B, 3, H, W), a function of the images' index."""
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    drawn = [torch.randn(3, *size, generator=torch.Generator().manual_seed(seed_of(int(i)))) for i in index]
    return (torch.stack(drawn) * SIGMA).clamp(-MOST, MOST) * std
