"""What is known of prototypes that are patches of training images, and what their models offer."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from interp_models.core.outputs import InterpOutput
from interp_models.core.scoring import PrototypeModel
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


class Prototypical(PrototypeModel, Protocol):
    """A model whose prototypes can be shown and judged."""

    sources: Sources

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> what prototypes are compared with, (B, D, h, w)."""

    def similarity(self, distances: Tensor) -> Tensor:
        """Squared L2 distances -> similarities."""

    def readings(self, output: InterpOutput, targets: Tensor, image_size: Size, n: int | None = None) -> list[Reading]:
        """Why each image is of its target class, by at most n prototypes, or as many as the model thinks fit."""

    def prototype_sheets(self, classes: Sequence[str]) -> dict[str, list[int]]:
        """Numbers of the prototypes that are shown together, by a name for a file."""


def has_prototypes(model: Any) -> TypeGuard[Prototypical]:
    """Whether a model has what `Prototypical` asks for."""
    return all(hasattr(model, name) for name in ("sources", "readings", "prototype_sheets"))


def needs_every_class(model: Any) -> bool:
    """Whether prototypes belong to classes, so that a class without a training image leaves some without a patch."""
    return has_prototypes(model) and getattr(model, "class_specific", True)
