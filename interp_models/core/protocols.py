"""What models offer beside logits: explanations of their own, prototypes."""

from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn


class SelfExplaining(Protocol):
    """A model that names its feature layer and explains its own output, as every architecture of this package."""

    explanations: tuple[str, ...]
    """The kinds of map that `explain` returns, the default first."""

    @property
    def feature_layer(self) -> nn.Module:
        """The module whose output is the last feature map, (B, C, h, w)."""

    def explain(self, output: Any, targets: Tensor, kind: str | None = None) -> Tensor:
        """Maps of the evidence for the classes `targets`, (B, h, w)."""

    def __call__(self, images: Tensor) -> Any:
        """Return the output that `explain` takes."""


def explains_itself(model: Any) -> TypeGuard[SelfExplaining]:
    """Whether a model has the attributes of `SelfExplaining`."""
    return all(hasattr(model, name) for name in ("explanations", "feature_layer", "explain"))


class PrototypeModel(Protocol):
    """A model with prototypes that prototype metrics can judge."""

    @property
    def prototypes(self) -> Tensor:
        """(P, D, a, b): the prototypes, in the feature space of the model."""

    @property
    def prototype_classes(self) -> Tensor:
        """(P, K) bool: the classes of each prototype; a removed prototype has none."""

    @property
    def prototype_weights(self) -> Tensor | None:
        """(K, P): the weight of each prototype for each class; None if the model has no such weights."""

    def __call__(self, images: Tensor) -> Any:
        """Return an output whose `maps` are the similarity maps, (B, P, h, w)."""
