"""The interface of models that classify by parts."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from interp_models.core.outputs import InterpOutput


class PartModel(nn.Module, ABC):
    """Abstract: a model whose logits are weighted sums of part scores. A part's score is that of its best region.

    An architecture has it as a second base: `class MyModel(InterpModule, PartModel)`. Its parts are then drawn on the
    page and on part sheets.
    """

    @property
    @abstractmethod
    def part_weights(self) -> Tensor:
        """The weight of each part for each class, (K, P)."""

    @abstractmethod
    def boxes(self, output: InterpOutput) -> Tensor:
        """The best region of each part, (B, P, 4), XYXY in fractions of the image."""

    @abstractmethod
    def best(self, output: InterpOutput) -> Tensor:
        """The score of the best region of each part, (B, P)."""
