"""What is known of prototypes that are patches of training images, and what their models offer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interp_models.core.outputs import InterpOutput
from interp_models.prototypes.boxes import Size


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


class Prototypical(nn.Module, ABC):
    """A model whose prototypes can be shown and judged, as a `core.scoring.PrototypeModel`.

    An architecture names it as a second base: `class MyModel(InterpModule, Prototypical)`. Its prototypes are then
    drawn after the training, judged by prototype metrics and shown on the page.
    """

    prototypes: nn.Parameter
    """(P, D, a, b)."""
    sources: Sources
    """Where they come from."""
    class_specific: bool = True
    """Whether prototypes belong to classes, so that a class without a training image leaves some without a patch."""

    @property
    @abstractmethod
    def prototype_classes(self) -> Tensor:
        """(P, K) bool, the classes in whose images a prototype is to be found; none for one that is removed."""

    @property
    @abstractmethod
    def prototype_weights(self) -> Tensor | None:
        """(K, P), what a prototype counts for the classes; None if prototypes have no weights."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> what prototypes are compared with, (B, D, h, w)."""

    @abstractmethod
    def similarity(self, distances: Tensor) -> Tensor:
        """Squared L2 distances -> similarities."""

    @abstractmethod
    def readings(self, output: InterpOutput, targets: Tensor, image_size: Size, n: int | None = None) -> list[Reading]:
        """Why each image is of its target class, by at most n prototypes, or as many as the model thinks fit."""

    @abstractmethod
    def prototype_sheets(self, classes: Sequence[str]) -> dict[str, list[int]]:
        """Numbers of the prototypes that are shown together, by a name for a file."""
