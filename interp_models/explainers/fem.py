"""The feature explanation method (FEM): cells where feature maps are unusually high, of one layer or of several."""

from dataclasses import dataclass

import torch
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.core.maps import weighted
from interp_models.core.scoring import Target
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.features import activations, stage_activations
from interp_models.explainers.forms import Reshape
from interp_models.explainers.of_layer import Fuse, LayerNames, OfLayer, fused


@EXPLAINERS.register("fem")
@dataclass(kw_only=True, eq=False, repr=False)
class FEM(OfLayer):
    """FEM = Σ_k μ_k B_k, with B_k = 1 where A_k > μ_k + K σ_k, else 0 (Fuad et al., IPTA 2020: the K-sigma rule).

    A are the layer's feature maps, μ_k and σ_k the mean and standard deviation of A_k over its cells. The map is the
    same for every class.
    """

    uses_class = False
    amplifies_rounding = True

    sigmas: float = 2.0
    """Factor K of the standard deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigmas >= 0:
            raise InputError(f"sigmas must not be below 0; got {self.sigmas}")

    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        return self._marked(activations(self, inputs, target)[0])

    def _marked(self, a: Tensor) -> Tensor:
        """Feature maps (B, C, h, w) -> map (B, h, w)."""
        mean = a.mean(dim=(2, 3), keepdim=True)
        # A constant map has σ = 0; rounding must not put a cell above its mean.
        rounding = torch.finfo(a.dtype).eps * 8 * a.abs().amax(dim=(2, 3), keepdim=True)
        high = a > mean + self.sigmas * a.std(dim=(2, 3), keepdim=True, correction=0) + rounding
        return weighted(mean[:, :, 0, 0], high.to(a.dtype))


@EXPLAINERS.register("mlfem")
@dataclass(kw_only=True, eq=False, repr=False)
class MLFEM(FEM):
    """Multi-layered FEM: the maps of FEM of several layers, each scaled to [0, 1], fused at the finest resolution
    (Bourroux et al., ICPRAI 2022).

    See `fem`. The layers are the last feature map of every resolution, see `layers.stages`, all read in one pass. The
    map is the same for every class.
    """

    layer: LayerNames = None
    """Dotted names of the layers; None takes the last feature map of every resolution."""
    reshape: Reshape = None
    """Form of the layers' outputs, `nchw`, `nhwc`, `tokens` or a function; None finds out."""
    fuse: Fuse = "mean"
    """`mean` or `max` of the maps."""

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        maps, _, _ = stage_activations(self.model, self.layer, self.reshape, inputs, target, gradient=False)
        return fused([self._marked(a) for a in maps], self.fuse)
