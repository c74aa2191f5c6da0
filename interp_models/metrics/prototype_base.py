"""The base of metrics of prototypes, with one value per prototype."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from interp_models.core.maps import upsampled
from interp_models.core.registry import Registry
from interp_models.core.scoring import PrototypeModel
from interp_models.metrics.base import Measure


class Found(NamedTuple):
    """A batch of images with the prototypes' similarity maps."""

    images: Tensor
    """(B, 3, H, W)."""
    maps: Tensor
    """(B, P, h, w), similarities."""
    label: Tensor
    """(B,) int64."""
    number: Tensor
    """(B,) int64, position in the data."""
    parts: Tensor | None
    """(B, J, 2), x and y of key points in pixels."""
    visible: Tensor | None
    """(B, J) bool."""


class PrototypeMetric(Measure, ABC):
    """Judges the prototypes of a model, each by itself; values are means over those where they are defined.

    Args:
        model: whose prototypes.
        part_names: of the key points, J of them.
    """

    split: ClassVar[Literal["train", "test"] | None] = "test"
    """Split whose images the metric uses; None for no images."""
    needs_parts: ClassVar[bool] = True
    """Whether the metric needs key points of parts."""
    zero_if_removed: ClassVar[tuple[str, ...]] = ()
    """Keys that are 0 for a removed prototype; all others are undefined for it."""

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.classes = model.prototype_classes.clone()

    @abstractmethod
    def update(self, model: PrototypeModel, found: Found) -> None:
        """Add a batch."""

    @abstractmethod
    def per_prototype(self) -> dict[str, Tensor]:
        """The value of every prototype (P,) by key, NaN where it is undefined, such as of removed prototypes."""

    def compute(self) -> dict[str, Tensor]:
        """The mean of every key; NaN if it is defined for no prototype."""
        return {key: value.nanmean() for key, value in self.per_prototype().items()}

    def of_all_ranks(self) -> dict[str, Tensor]:
        """`per_prototype` over the images of all ranks."""
        with self.sync_context(should_sync=self._to_sync):
            return {key: value.clone() for key, value in self.per_prototype().items()}

    def in_use(self, values: Tensor) -> Tensor:
        """The values (P,) with NaN for prototypes that are removed."""
        return torch.where(self.classes.any(dim=1), values, torch.nan)

    def pairs(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """The images of a batch, by position, and the prototypes that are to be found in each, int64 (n,) each."""
        image, prototype = self.classes[:, label].T.nonzero(as_tuple=True)
        return image, prototype


PROTOTYPE_METRICS: Registry[PrototypeMetric] = Registry("prototype metric", "interp_models.metrics.PROTOTYPE_METRICS")


def peaks(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Peaks (n, 2) of maps (n, h, w) upsampled bicubically to the image, x and y in pixels.

    One of equal pixels, as rounding has it.
    """
    pixel = torch.cat([large.flatten(1).argmax(dim=1) for large in upsampled(maps, size)]).to(maps.device)
    return torch.stack([pixel % size[1], pixel // size[1]], dim=1)


def near_parts(maps: Tensor, size: tuple[int, int], parts: Tensor, visible: Tensor) -> Tensor:
    """Which visible parts (n, J) lie in the square around the peak of each map (n, h, w), bool (n, J).

    The square reaches 36 / 224 of the image's side to each side of the peak, its border included (Huang et al. 2023:
    72 pixels of 224).
    """
    reach = torch.tensor([size[1], size[0]], device=maps.device) * 36 / 224
    away = (parts - peaks(maps, size)[:, None]).abs()
    return (away <= reach).all(dim=2) & visible


def undefined_without(count: Tensor, total: Tensor) -> Tensor:
    """count / total, NaN where there is none."""
    return torch.where(total > 0, count / total.clamp(min=1), math.nan)
