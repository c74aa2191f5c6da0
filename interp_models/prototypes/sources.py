"""Sources of prototypes in the training images, and the interface of prototype models."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interp_models.core.boxes import Size
from interp_models.core.outputs import InterpOutput
from interp_models.prototypes.distances import squared_distances, unit


class Sources(nn.Module):
    """The source of each prototype: the training image and patch that it was replaced by.

    The tensors are buffers, so checkpoints contain them. Boxes are XYXY in pixels after the test transform, the ends
    exclusive.

    Args:
        prototypes: number of prototypes P.
    """

    image: Tensor
    """Position of the image in the training split, (P,) int64; -1 for a prototype that is not a patch."""
    cell: Tensor
    """Row and column of the patch's first cell, (P, 2) int64."""
    receptive_box: Tensor
    """Box around the receptive field of the patch, (P, 4) int64."""
    activation_box: Tensor
    """Box around the 5 % of the image's pixels with the highest activation, (P, 4) int64."""
    images: Tensor
    """Fingerprint of the training images, () int64; -1 before the first push."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("image", torch.full((prototypes,), -1))
        self.register_buffer("cell", torch.zeros(prototypes, 2, dtype=torch.long))
        self.register_buffer("receptive_box", torch.zeros(prototypes, 4, dtype=torch.long))
        self.register_buffer("activation_box", torch.zeros(prototypes, 4, dtype=torch.long))
        self.register_buffer("images", torch.tensor(-1))


class Match(NamedTuple):
    """The role of one prototype in the prediction for one image."""

    prototype: int
    """Its number."""
    box: tuple[int, int, int, int] | None
    """The place where it was found, XYXY in pixels; None if it was not found."""
    text: str
    """Its contribution, in words or as a formula."""


class Reading(NamedTuple):
    """The reasons for the prediction for one image, as text and boxes."""

    matches: list[Match]
    """The prototypes, in the order in which to show them."""
    total: str
    """A sentence that sums up their contributions."""


class Prototypical(nn.Module, ABC):
    """Abstract: a model with prototypes that are patches of training images.

    An architecture has it as a second base: `class MyModel(InterpModule, Prototypical)`. Its prototypes are then drawn
    after the training, judged by prototype metrics, and shown on the page. It fulfils `core.protocols.PrototypeModel`.
    """

    prototypes: nn.Parameter
    """(P, D, a, b)."""
    sources: Sources
    """Sources of the prototypes."""
    class_specific: bool = True
    """Whether each prototype belongs to a class. Then every class needs a training image for the push."""

    cosine: bool = False
    """Whether `features` have norm 1 in every cell, and prototypes are compared after they were divided by theirs."""

    @property
    def vectors(self) -> Tensor:
        """The prototypes as patches of `features` are compared with them, (P, D, a, b)."""
        return unit(self.prototypes) if self.cosine else self.prototypes

    def distances(self, features: Tensor) -> Tensor:
        """Squared distances of all patches of `features` to all prototypes, (B, P, h', w')."""
        return squared_distances(features, self.vectors, self.cosine)

    @property
    @abstractmethod
    def prototype_classes(self) -> Tensor:
        """The classes of each prototype, (P, K) bool: those whose images should contain it. None for a removed
        prototype: its row is all False."""

    @property
    @abstractmethod
    def prototype_weights(self) -> Tensor | None:
        """The weight of each prototype for each class, (K, P); None if the model has no such weights."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> features that prototypes are compared with, (B, D, h, w)."""

    @abstractmethod
    def similarity(self, distances: Tensor) -> Tensor:
        """Squared L2 distances -> similarities."""

    @abstractmethod
    def readings(self, output: InterpOutput, targets: Tensor, image_size: Size, n: int | None = None) -> list[Reading]:
        """Explain the score of each image's target class by its prototypes.

        Args:
            output: return value of `forward` for the images.
            targets: class to explain, int64 (B,).
            image_size: height and width of the images.
            n: at most so many prototypes per image; None leaves the number to the model.
        """

    @abstractmethod
    def prototype_sheets(self, classes: Sequence[str]) -> dict[str, list[int]]:
        """Group the prototypes into sheets that are drawn together.

        Args:
            classes: class names by label.

        Returns:
            For each sheet, its file name and the numbers of its prototypes.
        """
