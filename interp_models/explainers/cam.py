"""Class activation maps of one layer. A are its feature maps (C, h, w), y the target's score, g = ∂y/∂A."""

import torch
from torch import Tensor, nn

from interp_models.errors import InputError
from interp_models.explainers.base import EXPLAINERS, Explainer, captured, target_layer, target_scores
from interp_models.scoring import Score, Target, logits_of, resolve_target


@EXPLAINERS.register("activation_map")
class ActivationMap(Explainer):
    """AM = (1/C) Σ_k A_k, the same for every class (Gomez et al. 2023, section 3.1.3).

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer; None takes the last that gives a spatial map.
    """

    def __init__(self, model: nn.Module, *, layer: str | None = None) -> None:
        super().__init__(model)
        self.layer = layer

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        with torch.no_grad(), captured(target_layer(self.model, self.layer, inputs), gradient=False) as outputs:
            resolve_target(target, logits_of(self.model(inputs)))  # unused, but a class that does not exist is refused
        return _last(outputs).mean(dim=1)


@EXPLAINERS.register("gradcam")
class GradCAM(Explainer):
    """Grad-CAM = ReLU(Σ_k w_k A_k) with w_k = mean over cells of g_k (Selvaraju et al., ICCV 2017, equations 1 and 2).

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer; None takes the last that gives a spatial map.
        relu: keep positive evidence alone, as in the paper.
        score: what is explained.
    """

    def __init__(
        self, model: nn.Module, *, layer: str | None = None, relu: bool = True, score: Score = "logit"
    ) -> None:
        super().__init__(model, score=score)
        self.layer = layer
        self.relu = relu

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        activations, gradients = activations_and_gradients(self, self.layer, inputs, target)
        weights = gradients.mean(dim=(2, 3), keepdim=True)
        maps = (weights * activations).sum(dim=1)
        return maps.relu() if self.relu else maps


def activations_and_gradients(
    explainer: Explainer, layer: str | None, inputs: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    """A and g = ∂y/∂A of the target layer, both float32 (B, C, h, w): one forward pass, and the tail's backward.

    Raises:
        InputError: if the score does not depend on the layer through differentiable operations.
    """
    module = target_layer(explainer.model, layer, inputs)
    with torch.no_grad(), captured(module, gradient=True) as outputs:
        score = target_scores(explainer.model(inputs), explainer.score, target).sum()
    activations = _last(outputs)
    gradients = None
    if score.requires_grad:
        (gradients,) = torch.autograd.grad(score, activations, allow_unused=True)
    if gradients is None:
        raise InputError(f"no gradient path from the score back to layer {layer or type(module).__name__}")
    return activations.detach().float(), gradients.float()


def _last(outputs: list[Tensor]) -> Tensor:
    if not outputs:
        raise InputError("the layer was not used in the forward pass")
    return outputs[-1]
