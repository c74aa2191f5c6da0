"""What models that decide by parts offer, so that their parts can be shown."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from interp_models.core.outputs import InterpOutput


class PartModel(nn.Module, ABC):
    """A model whose logits are sums over parts, each found at its best region.

    An architecture names it as a second base: `class MyModel(InterpModule, PartModel)`. Its parts are then drawn on
    the page and on part sheets.
    """

    @property
    @abstractmethod
    def part_weights(self) -> Tensor:
        """(K, P), what a part counts for the classes."""

    @abstractmethod
    def boxes(self, output: InterpOutput) -> Tensor:
        """(B, P, 4), the best region of each part, XYXY in fractions of the image."""

    @abstractmethod
    def best(self, output: InterpOutput) -> Tensor:
        """(B, P), its score."""
