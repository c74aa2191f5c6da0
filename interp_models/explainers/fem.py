"""The feature explanation method (FEM): cells where feature maps are unusually high, of one layer or of several."""

import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.maps import weighted
from interp_models.core.scoring import Target
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.features import OfLayer, activations, fused, stage_activations
from interp_models.explainers.forms import Reshape
from interp_models.explainers.layers import Fuse, LayerNames


@EXPLAINERS.register("fem")
class FEM(OfLayer):
    """FEM = Σ_k μ_k B_k, with B_k = 1 where A_k > μ_k + K σ_k, else 0 (Fuad et al., IPTA 2020: the K-sigma rule).

    A are the layer's feature maps, μ_k and σ_k the mean and standard deviation of A_k over its cells. The map is the
    same for every class.

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer, or several; None finds the last feature map, see `layers.target_layer`.
        reshape: form of the layer's output, `nchw`, `nhwc`, `tokens` or a function; None finds out.
        fuse: `mean` or `max` of several layers' maps, each scaled to [0, 1] and resized to the finest grid.
        sigmas: factor K of the standard deviation.
    """

    uses_class = False
    amplifies_rounding = True

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerNames = None,
        reshape: Reshape = None,
        fuse: Fuse = "mean",
        sigmas: float = 2.0,
    ) -> None:
        super().__init__(model, layer=layer, reshape=reshape, fuse=fuse)
        if not sigmas >= 0:
            raise InputError(f"sigmas must not be below 0; got {sigmas}")
        self.sigmas = sigmas

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
class MLFEM(FEM):
    """Multi-layered FEM: the maps of FEM of several layers, each scaled to [0, 1], fused at the finest resolution
    (Bourroux et al., ICPRAI 2022).

    See `fem`. The layers are the last feature map of every resolution, see `layers.stages`, all read in one pass. The
    map is the same for every class.

    Args:
        model: any module that returns logits.
        layer: dotted names of the layers; None takes the last feature map of every resolution.
        reshape: form of the layers' outputs, `nchw`, `nhwc`, `tokens` or a function; None finds out.
        fuse: `mean` or `max` of the maps.
        sigmas: factor K of the standard deviation.
    """

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        maps, _, _ = stage_activations(self.model, self.layer, self.reshape, inputs, target, gradient=False)
        return fused([self._marked(a) for a in maps], self.fuse)
