"""Opti-CAM: the mixture of feature maps that, laid over the image, keeps the score highest."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.maps import stretched, weighted
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS, Explainer, target_scores
from interp_models.explainers.features import activations


@EXPLAINERS.register("opticam")
class OptiCAM(Explainer):
    """S = Σ_k softmax(u)_k A_k with u = argmax of the score of x ⊙ n(up(S)) (Zhang et al., CVIU 2024).

    A are the layer's activations above 0, up is bilinear, n stretches to [0, 1]. Adam finds u from a constant start.
    Each image keeps its own best u, and stops when that has not been bettered for `patience` steps; images of a batch
    do not influence each other. One forward and backward pass per step. Where gradients are as small as rounding Adam
    still makes whole steps, so that in float32 such maps are not the same to the last digits in another batch.

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer; None takes the last that gives a spatial map.
        steps: of Adam, at most.
        lr: of Adam.
        patience: see above; None makes all steps.
        score: what is maximised.
    """

    passes = "steps + 1"
    back_to_images = True
    amplifies_rounding = True
    small: ClassVar[Mapping[str, Any]] = {"steps": 4}

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | None = None,
        steps: int = 50,
        lr: float = 0.1,
        patience: int | None = None,
        score: Score = "logit",
    ) -> None:
        super().__init__(model, score=score)
        if steps < 1 or lr <= 0 or (patience is not None and patience < 1):
            raise InputError(f"opticam needs steps, patience >= 1 and lr > 0; got {steps}, {patience}, {lr}")
        self.layer, self.steps, self.lr, self.patience = layer, steps, lr, patience

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        a, targets = activations(self, self.layer, inputs, target)
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
                (gradient,) = torch.autograd.grad(-found.sum(), u)
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
