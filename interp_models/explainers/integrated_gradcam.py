"""Integrated Grad-CAM: Grad-CAM averaged along the path from a baseline to the image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from interp_models.core.batches import default_batch
from interp_models.core.errors import InputError
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.combinators import points, resolved
from interp_models.explainers.features import activations_and_gradients, shared_passes
from interp_models.explainers.of_layer import OfLayer

PathPoints = Literal["left", "right", "gauss_legendre"]
"""Points of a path: k / steps for k = 0 ... steps - 1, or for k = 1 ... steps, with equal weights; or the
Gauss-Legendre points and weights."""


@EXPLAINERS.register("integrated_gradcam")
@dataclass(kw_only=True, eq=False, repr=False)
class IntegratedGradCAM(OfLayer):
    """Integrated Grad-CAM = ∫ ReLU(Σ_k w_k A_k) dα at x' + α (x - x'), with w_k = mean over cells of g_k (Sattarzadeh
    et al., ICASSP 2021; the sum of the authors' code).

    x is the image, x' the baseline; α runs from 0 to 1. A are the layer's feature maps, y is the target's score, and
    g = ∂y/∂A, both at the point of the path. Points are processed a few at a time, so memory does not grow with
    `steps`.
    """

    passes = "steps"
    small: ClassVar[Mapping[str, Any]] = {"steps": 3, "batch": 2}

    steps: int = 50
    """Number of points on the path, with one forward pass and the backward pass of the layers after the layer each."""
    points: PathPoints = "left"
    """`left` takes the points k / steps from k = 0 (as in the authors' code), `right` from k = 1; `gauss_legendre` has
    a smaller error for the same number of points."""
    baseline: float = 0.0
    """Value of every pixel of the baseline x'; 0 is black."""
    relu: bool = True
    """Keep positive evidence only, at each point, as in the authors' code."""
    score: Score = "logit"
    """Explain the target's `logit` or its `probability`."""
    batch: int | None = None
    """Images per forward pass; None chooses it for the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or (self.batch is not None and self.batch < 1):
            raise InputError(f"integrated_gradcam: steps and batch must be at least 1; got {self.steps}, {self.batch}")

    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        targets, change = resolved(self.model, inputs, target), inputs - self.baseline
        alphas, weights = (torch.as_tensor(x).to(inputs) for x in self._points())
        jobs = torch.arange(self.steps * len(inputs), device=inputs.device)  # point 0 of every image, then point 1, ...
        total: Tensor | None = None
        for chunk in torch.split(jobs, self.batch or default_batch(inputs)):
            t, b = chunk // len(inputs), chunk % len(inputs)
            images = self.baseline + alphas[t].view(-1, 1, 1, 1) * change[b]
            with shared_passes():  # of its own, so that these passes are not kept in the caller's
                a, g = activations_and_gradients(self, images, targets[b])
            found = (g.mean(dim=(2, 3), keepdim=True) * a).sum(dim=1)
            found = found.relu() if self.relu else found
            total = found.new_zeros(len(inputs), *found.shape[1:]) if total is None else total
            total.index_add_(0, b, weights[t].view(-1, 1, 1).to(found) * found)
        assert total is not None
        return total

    def _points(self) -> tuple[np.ndarray, np.ndarray]:
        """The points α in [0, 1], and their weights, which add up to 1."""
        if self.points == "gauss_legendre":
            return points(self.steps, "gauss_legendre")
        alphas, weights = points(self.steps, "riemann")
        return (alphas if self.points == "right" else alphas - 1 / self.steps), weights
