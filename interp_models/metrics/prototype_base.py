"""The base class of prototype metrics, with one value per prototype."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from interp_models.core.maps import upsampled
from interp_models.core.protocols import PrototypeModel
from interp_models.core.registry import Registry
from interp_models.metrics.base import Measure


class Found(NamedTuple):
    """A batch of images with the similarity maps of the prototypes."""

    images: Tensor
    """(B, 3, H, W)."""
    maps: Tensor
    """Similarity maps (B, P, h, w)."""
    label: Tensor
    """Class of each image, (B,) int64."""
    number: Tensor
    """Position of each image in the data set, (B,) int64."""
    parts: Tensor | None
    """Key points of parts, x and y in pixels (B, J, 2)."""
    visible: Tensor | None
    """Whether each part is visible, (B, J) bool."""
    mask: Tensor | None = None
    """Mask of the object, (B, H, W) bool."""


class PrototypeMetric(Measure, ABC):
    """Abstract: a metric with one value per prototype of a model.

    It is a torchmetrics `Metric`: `update` adds a batch, `compute` gives the mean over prototypes with a defined value.
    A subclass implements `update` and `per_prototype`, and sets `keys` and the other class attributes of `Measure`.

    Args:
        model: the model whose prototypes are judged.
        part_names: names of the J key points.
    """

    split: ClassVar[Literal["train", "test"] | None] = "test"
    """Split whose images the metric uses; None if it uses no images."""
    needs: ClassVar[tuple[Literal["parts", "mask"], ...]] = ("parts",)
    """Ground truth that the metric needs: key points of parts, masks of the object."""
    zero_if_removed: ClassVar[tuple[str, ...]] = ()
    """Keys that are 0 for a removed prototype. The other keys are undefined for it."""

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.classes = model.prototype_classes.clone()

    @abstractmethod
    def update(self, model: PrototypeModel, found: Found) -> None:
        """Add a batch.

        Args:
            model: the model whose prototypes are judged.
            found: the images with their similarity maps and ground truth.
        """

    @abstractmethod
    def per_prototype(self) -> dict[str, Tensor]:
        """For each key the values (P,) of all prototypes. NaN where a value is undefined, as for removed prototypes."""

    def compute(self) -> dict[str, Tensor]:
        """For each key the mean over prototypes with a defined value; NaN if there is none."""
        return {key: value.nanmean() for key, value in self.per_prototype().items()}

    def of_all_ranks(self) -> dict[str, Tensor]:
        """`per_prototype`, computed from the images of all ranks."""
        with self.sync_context(should_sync=self._to_sync):
            return {key: value.clone() for key, value in self.per_prototype().items()}

    def in_use(self, values: Tensor) -> Tensor:
        """Set the values (P,) of removed prototypes to NaN."""
        return torch.where(self.classes.any(dim=1), values, torch.nan)

    def pairs(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """All pairs of an image of the batch and a prototype of its class, as two index tensors, int64 (n,) each."""
        image, prototype = self.classes[:, label].T.nonzero(as_tuple=True)
        return image, prototype


PROTOTYPE_METRICS: Registry[PrototypeMetric] = Registry("prototype metric", "interp_models.metrics.PROTOTYPE_METRICS")


def peaks(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Peaks of maps (n, h, w), upsampled bicubically to the image: x and y in pixels, (n, 2).

    Of several equal pixels any may be taken.
    """
    pixel = torch.cat([large.flatten(1).argmax(dim=1) for large in upsampled(maps, size)]).to(maps.device)
    return torch.stack([pixel % size[1], pixel // size[1]], dim=1)


def near_parts(maps: Tensor, size: tuple[int, int], parts: Tensor, visible: Tensor) -> Tensor:
    """Whether each visible part lies in the square around the peak of its map, (n, J) bool.

    The square is centred at the peak, and its side is 72 / 224 of the image's side, borders included (Huang et al.
    2023: 72 pixels of 224).

    Args:
        maps: (n, h, w).
        size: height and width of the images.
        parts: key points, x and y in pixels (n, J, 2).
        visible: (n, J) bool.
    """
    reach = torch.tensor([size[1], size[0]], device=maps.device) * 36 / 224
    away = (parts - peaks(maps, size)[:, None]).abs()
    return (away <= reach).all(dim=2) & visible


def undefined_without(count: Tensor, total: Tensor) -> Tensor:
    """count / total, NaN where total is 0."""
    return torch.where(total > 0, count / total.clamp(min=1), math.nan)
