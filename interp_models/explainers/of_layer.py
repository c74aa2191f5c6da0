"""Base classes of class activation maps: explainers that read the feature maps of a layer.

The fields of a class are its options, as in `mixtures`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.maps import stretched
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import ByFields
from interp_models.explainers.forms import KINDS, Reshape
from interp_models.explainers.layers import Layer, target_layer

LayerNames = str | list[str] | None
"""Type of the option `layer`: a dotted name, several, or None to find the last feature map."""
Fuse = Literal["mean", "max"]
"""How the maps of several layers become one."""


@dataclass(kw_only=True, eq=False, repr=False)
class OfLayer(ByFields, ABC):
    """Abstract: an explainer that reads the feature maps of a layer.

    A subclass implements `_of_layer`.
    """

    layer: LayerNames = None
    """Dotted name of the layer, or several; None finds the last feature map, see `layers.target_layer`."""
    reshape: Reshape = None
    """Form of the layer's output, `nchw`, `nhwc`, `tokens` or a function; None finds out."""
    fuse: Fuse = "mean"
    """`mean` or `max` of several layers' maps, each scaled to [0, 1] and resized to the finest grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layer, self.reshape)
        self._one = self.layer if not isinstance(self.layer, list) else self.layer[-1]

    def target_layer(self, inputs: Tensor) -> Layer:
        """The layer that is read for these images; if there are several, the one being processed."""
        return target_layer(self.model, self._one, inputs, self.reshape)

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        if not isinstance(self.layer, list):
            return self._of_layer(inputs, target)
        maps = []
        for name in self.layer:
            self._one = name
            maps.append(self._of_layer(inputs, target))
        return fused(maps, self.fuse)

    @abstractmethod
    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        """The maps (B, h, w) of one layer, see `target_layer`."""


@dataclass(kw_only=True, eq=False, repr=False)
class LayerExplainer(OfLayer, ABC):
    """Abstract: a map computed from a layer's features. By default only its positive part is kept.

    A subclass implements `_signed`.
    """

    relu: bool = True
    """Keep positive evidence only."""

    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        maps = self._signed(inputs, target)
        return maps.relu() if self.relu else maps

    @abstractmethod
    def _signed(self, inputs: Tensor, target: Target) -> Tensor:
        """The map (B, h, w) before the ReLU."""


@dataclass(kw_only=True, eq=False, repr=False)
class ScoredLayerExplainer(LayerExplainer, ABC):
    """Abstract: a map that explains the logit or the probability."""

    score: Score = "logit"
    """Explain the target's `logit` or its `probability`."""


def check_layers(layer: LayerNames, reshape: Reshape) -> None:
    """Raise `InputError` for options `layer` and `reshape` that make no sense."""
    if reshape is not None and not callable(reshape) and reshape not in KINDS:
        raise InputError(f"reshape must be one of {', '.join(KINDS)}, or a function; got {reshape!r}")
    if reshape is not None and layer is None:
        raise InputError("reshape= says what a layer gives, so that it needs layer=NAME")
    if isinstance(layer, list) and not layer:
        raise InputError("layer must name at least one layer; got an empty list")
    if layer is not None and not all(isinstance(one, str) for one in (layer if isinstance(layer, list) else [layer])):
        found = type(layer).__name__ if isinstance(layer, nn.Module) else repr(layer)
        raise InputError(
            f"layer must be a dotted name of the model, such as 'layer4.1', or a list of them; got {found}"
        )


def fused(maps: Sequence[Tensor], fuse: Fuse) -> Tensor:
    """The mean or maximum of several maps of each image, scaled to [0, 1] and resized bilinearly to the finest grid.

    >>> coarse, fine = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.0, 0.0, 0.0, 8.0]]])
    >>> fused([coarse, fine], "mean").tolist(), fused([coarse, fine], "max").tolist()
    ([[[0.0, 0.125, 0.375, 1.0]]], [[[0.0, 0.25, 0.75, 1.0]]])
    """
    size = (max(one.shape[1] for one in maps), max(one.shape[2] for one in maps))
    large = torch.stack([stretched(one.float(), size)[:, 0] for one in maps])
    return large.mean(dim=0) if fuse == "mean" else large.amax(dim=0)
