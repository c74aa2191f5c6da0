"""Opti-CAM: the weighted sum of feature maps that, as a mask of the image, maximises the score."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.core.maps import stretched, weighted
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS, gradient_of, target_scores
from interp_models.explainers.features import activations
from interp_models.explainers.of_layer import OfLayer


@EXPLAINERS.register("opticam")
@dataclass(kw_only=True, eq=False, repr=False)
class OptiCAM(OfLayer):
    """Opti-CAM: S = Σ_k softmax(u)_k A_k, where u maximises the score of x ⊙ n(up(S)) (Zhang et al., CVIU 2024).

    A is the ReLU of the layer's feature maps, up is bilinear upsampling, and n is min-max normalisation to [0, 1]. Adam
    optimises u from a constant start, and the best u of each image is kept. Images of a batch do not influence each
    other. Each step takes one forward and one backward pass. Adam makes steps of full size even where gradients are
    as small as rounding errors, so such maps may differ slightly between batches in float32.
    """

    passes = "steps + 1"
    back_to_images = True
    amplifies_rounding = True
    small: ClassVar[Mapping[str, Any]] = {"steps": 4}

    steps: int = 50
    """Maximal number of Adam steps."""
    lr: float = 0.1
    """Learning rate of Adam."""
    patience: int | None = None
    """Stop an image after so many steps without a better score; None makes all steps."""
    score: Score = "logit"
    """Maximise the target's `logit` or its `probability`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.lr <= 0 or (self.patience is not None and self.patience < 1):
            raise InputError(
                f"opticam needs steps, patience >= 1 and lr > 0; got {self.steps}, {self.patience}, {self.lr}"
            )

    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        a, targets = activations(self, inputs, target)
        a, model = a.relu(), self.prepared(inputs)
        u = a.new_full(a.shape[:2], 0.5).requires_grad_()
        optimizer = torch.optim.Adam([u], lr=self.lr)
        best, best_u = a.new_full((len(a),), -torch.inf), u.detach().clone()
        since = torch.zeros(len(a), dtype=torch.long, device=a.device)
        live = torch.arange(len(a), device=a.device)
        for _ in range(self.steps):
            with torch.enable_grad():
                masks = stretched(_mixed(u[live], a[live]), (inputs.shape[-2], inputs.shape[-1]))
                found = target_scores(model(inputs[live] * masks.to(inputs.dtype)), self.score, targets[live])
                gradient = gradient_of(-found.sum(), u, "the images")
            found = found.detach().to(best.dtype)
            better = found > best[live]
            best[live] = torch.where(better, found, best[live])
            best_u[live] = torch.where(better[:, None], u.detach()[live], best_u[live])
            since[live] = torch.where(better, 0, since[live] + 1)
            u.grad = gradient
            optimizer.step()
            if self.patience is not None:
                live = (since < self.patience).nonzero()[:, 0]
                if not len(live):
                    break
        return _mixed(best_u, a)


def _mixed(u: Tensor, a: Tensor) -> Tensor:
    """Σ_k softmax(u)_k A_k, (B, h, w)."""
    return weighted(u.softmax(dim=1), a)
