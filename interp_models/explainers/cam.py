"""Class activation maps of one layer: A are its feature maps (C, h, w), y is the target's score, g = ∂y/∂A."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from interp_models.core.errors import NotApplicable
from interp_models.core.maps import full_precision, weighted
from interp_models.core.scoring import Target
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.features import activations, activations_and_gradients, linear_head
from interp_models.explainers.of_layer import OfLayer, ScoredLayerExplainer


@EXPLAINERS.register("activation_map")
class ActivationMap(OfLayer):
    """AM = (1/C) Σ_k A_k, the same for every class (Gomez et al. 2023, section 3.1.3).

    A are the layer's C feature maps.
    """

    uses_class = False

    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        a, _ = activations(self, inputs, target)
        return a.mean(dim=1)


@EXPLAINERS.register("eigencam")
@dataclass(kw_only=True, eq=False, repr=False)
class EigenCAM(OfLayer):
    """Eigen-CAM = A v, with A the feature maps as a matrix (h·w, C) and v its first right singular vector (Muhammad and
    Yeasin, IJCNN 2020, equation 4).

    The map is the same for every class. The sign of a singular vector is arbitrary: v is chosen so that the map
    correlates positively with the activation map or, where that is 0, as after a layer norm without weights, so that
    Σ (A v)³ is positive.
    """

    uses_class = False

    centred: bool = False
    """Subtract each channel's mean over the cells first (as in pytorch-grad-cam)."""

    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        a, _ = activations(self, inputs, target)
        cells = a.flatten(2).transpose(1, 2)  # (B, h·w, C)
        mean = cells.mean(dim=2) - cells.mean(dim=(1, 2))[:, None]
        if self.centred:
            cells = cells - cells.mean(dim=1, keepdim=True)
        # A v = σ u. v is an eigenvector of Aᵀ A (C, C), u one of A Aᵀ (h·w, h·w): decompose the smaller matrix.
        with full_precision(cells):
            if cells.shape[1] > cells.shape[2]:
                _, vectors = torch.linalg.eigh((cells.transpose(1, 2) @ cells).double())
                projection = (cells.double() @ vectors[:, :, -1:])[:, :, 0]
            else:
                values, vectors = torch.linalg.eigh((cells @ cells.transpose(1, 2)).double())
                projection = vectors[:, :, -1] * values[:, -1:].clamp(min=0).sqrt()
        alike = (projection * mean.double()).sum(dim=1, keepdim=True)
        rounding = mean.abs().amax(dim=1) <= 1e-5 * a.abs().flatten(1).amax(dim=1)
        alike = torch.where(rounding[:, None], projection.pow(3).sum(dim=1, keepdim=True), alike)
        return torch.where(alike < 0, -projection, projection).float().view(-1, *a.shape[-2:])


@EXPLAINERS.register("cam")
class CAM(OfLayer):
    """CAM = Σ_k w_ck A_k for a network that ends in mean pooling of A and a linear layer w (Zhou et al., CVPR 2016,
    equation 2).

    Raises:
        NotApplicable: for other networks: the linear layer that gives the logits must read the mean of A over the
            cells.
    """

    needs = ("mean_and_linear",)

    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        head = linear_head(self, inputs, target)
        if head is None:
            raise NotApplicable(
                f"{type(self.model).__name__} does not end, after the layer, in the mean over cells and one linear "
                "layer that gives the logits; cam has no class weights to read"
            )
        a, weights, _ = head
        return weighted(weights, a)


class _OfGradient(ScoredLayerExplainer, ABC):
    """Abstract: a map computed from A and g."""

    def _signed(self, inputs: Tensor, target: Target) -> Tensor:
        return self._combine(*activations_and_gradients(self, inputs, target))

    @abstractmethod
    def _combine(self, a: Tensor, g: Tensor) -> Tensor:
        """A and g, float32 (B, C, h, w) -> map (B, h, w)."""


@EXPLAINERS.register("gradcam")
class GradCAM(_OfGradient):
    """Grad-CAM = ReLU(Σ_k w_k A_k) with w_k = mean over cells of g_k (Selvaraju et al., ICCV 2017, equations 1 and 2).

    A are the layer's feature maps, y is the target's score, and g = ∂y/∂A.
    """

    def _combine(self, a: Tensor, g: Tensor) -> Tensor:
        return (g.mean(dim=(2, 3), keepdim=True) * a).sum(dim=1)


@EXPLAINERS.register("gradcam_pp")
class GradCAMPlusPlus(_OfGradient):
    """Grad-CAM++ = ReLU(Σ_k w_k A_k) with w_k = Σ_ij α ReLU(g) and α = g² / (2 g² + g³ Σ_ab A), 0 where g is 0.

    A are the layer's feature maps, y is the target's score, and g = ∂y/∂A. Source: Chattopadhay et al., WACV 2018,
    equations 5, 10 and 19, for the score exp(y). Its factor exp(y), common to all weights, is left out.
    """

    def _combine(self, a: Tensor, g: Tensor) -> Tensor:
        denominator = 2 + g * a.sum(dim=(2, 3), keepdim=True)  # g² cancels: α = 1 / (2 + g Σ A)
        alpha = torch.where((g == 0) | (denominator == 0), 0.0, 1 / denominator)
        return ((alpha * g.relu()).sum(dim=(2, 3), keepdim=True) * a).sum(dim=1)


@EXPLAINERS.register("hirescam")
@dataclass(kw_only=True, eq=False, repr=False)
class HiResCAM(_OfGradient):
    """HiResCAM = Σ_k g_k ⊙ A_k (Draelos and Carin 2020, equation 5).

    A are the layer's feature maps, y is the target's score, and g = ∂y/∂A.
    """

    relu: bool = False
    """Keep positive evidence only; the paper keeps both signs."""

    def _combine(self, a: Tensor, g: Tensor) -> Tensor:
        return (g * a).sum(dim=1)


@EXPLAINERS.register("xgradcam")
class XGradCAM(_OfGradient):
    """XGrad-CAM = ReLU(Σ_k w_k A_k) with w_k = Σ_ij g ⊙ A / Σ_ij A, 0 where a channel's sum is 0 (Fu et al., BMVC 2020,
    equation 7).

    A are the layer's feature maps, y is the target's score, and g = ∂y/∂A.
    """

    amplifies_rounding = True

    def _combine(self, a: Tensor, g: Tensor) -> Tensor:
        total = a.sum(dim=(2, 3), keepdim=True)
        weights = torch.where(total == 0, 0.0, (g * a).sum(dim=(2, 3), keepdim=True) / total)
        return (weights * a).sum(dim=1)


@EXPLAINERS.register("layercam")
class LayerCAM(_OfGradient):
    """LayerCAM = ReLU(Σ_k ReLU(g_k) ⊙ A_k) (Jiang et al., TIP 2021, equations 5 to 7).

    A are the layer's feature maps, y is the target's score, and g = ∂y/∂A.
    """

    def _combine(self, a: Tensor, g: Tensor) -> Tensor:
        return (g.relu() * a).sum(dim=1)


@EXPLAINERS.register("guidancecam")
class GuidanceCAM(_OfGradient):
    """ReLU(Σ_k λ_k GM ⊙ A_k) with GM = ReLU(Σ_k g_k ⊙ A_k) and λ_k = mean over cells of g_k, without smoothing.

    A are the layer's feature maps, y is the target's score, and g = ∂y/∂A. Source: "Rethinking Gradient Weight's
    Influence over Saliency Map Estimation", Sensors 2022, equations 5 and 6. On a network that ends in mean pooling and
    a linear layer, the map is the square of Grad-CAM's.
    """

    def _combine(self, a: Tensor, g: Tensor) -> Tensor:
        guidance = (g * a).sum(dim=1).relu()
        return guidance * (g.mean(dim=(2, 3), keepdim=True) * a).sum(dim=1)
