"""Feature maps weighted by the drop of the score without them: Ablation-CAM and LIFT-CAM."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from interp_models.core.errors import NotApplicable
from interp_models.core.maps import weighted
from interp_models.core.scoring import Target, logits_of, scores_of
from interp_models.explainers.base import EXPLAINERS, gradient_of, target_scores
from interp_models.explainers.captures import replaced
from interp_models.explainers.deeplift import Rescale, check_complete
from interp_models.explainers.features import activations, linear_head
from interp_models.explainers.of_layer import ScoredLayerExplainer

VALUES = 2**21
"""Activations per pass of the layers after the target layer (8 MiB of float32)."""


class _OfTail(ScoredLayerExplainer, ABC):
    """Abstract: a map Σ_k w_k A_k. Its weights only need the tail: the part of the model after the layer."""

    def _signed(self, inputs: Tensor, target: Target) -> Tensor:
        head = linear_head(self, inputs, target) if self.score == "logit" else None
        if head is not None:
            a, w, y = head
            weights = self._closed(a, w, y)
        else:
            a, targets = activations(self, inputs, target)
            weights = self._general(inputs, a, targets)
        return weighted(weights, a)

    @abstractmethod
    def _closed(self, a: Tensor, w: Tensor, y: Tensor) -> Tensor:
        """Weights (B, C) in closed form, for y = w · (mean over cells of A) + b."""

    @abstractmethod
    def _general(self, inputs: Tensor, a: Tensor, targets: Tensor) -> Tensor:
        """Weights (B, C) for any tail."""

    def _tail(self, image: Tensor, variants: Tensor) -> Any:
        """Run the model on one image (1, 3, H, W) with the activations (n, C, h, w) in place of the layer's output. If
        the tail also reads earlier outputs, the model runs on n copies of the image."""
        layer = self.target_layer(image)
        try:
            with replaced(layer, variants):
                output = self.model(image)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # shapes do not match
            output = None
        if output is None or len(logits_of(output)) != len(variants):  # the batch size was read before the layer
            with replaced(layer, variants):
                output = self.model(image.expand(len(variants), -1, -1, -1))
        if len(logits_of(output)) != len(variants):
            raise NotApplicable(
                f"{type(self.model).__name__} returned {len(logits_of(output))} rows of logits for {len(variants)} "
                "variants of the layer's output; expected one per variant"
            )
        return output


@EXPLAINERS.register("ablationcam")
class AblationCAM(_OfTail):
    """Ablation-CAM = ReLU(Σ_k w_k A_k) with w_k = (y - y without A_k) / |y| (Desai and Ramaswamy, WACV 2020).

    A are the layer's feature maps, and y is the target's score. A channel is ablated by setting it to 0. Only the part
    of the model after the layer runs once per channel. On a network that ends in mean pooling and a linear layer,
    w_k = w_ck · (mean of A_k) / |y| needs no further pass.
    """

    def _closed(self, a: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return w * a.mean(dim=(2, 3)) / _guarded(y)

    @torch.no_grad()
    def _general(self, inputs: Tensor, a: Tensor, targets: Tensor) -> Tensor:
        channels, weights = a.shape[1], a.new_zeros(a.shape[:2])
        for i, c in enumerate(targets):
            y = scores_of(self._tail(inputs[i : i + 1], a[i : i + 1].to(inputs.dtype)), self.score)[0, c]
            for some in torch.split(torch.arange(channels, device=a.device), max(1, VALUES // a[0].numel())):
                variants = a[i].repeat(len(some), 1, 1, 1).to(inputs.dtype)
                variants[torch.arange(len(some)), some] = 0.0
                without = scores_of(self._tail(inputs[i : i + 1], variants), self.score)[:, c]
                weights[i, some] = (y - without).to(a.dtype) / _guarded(y)
        return weights


@EXPLAINERS.register("liftcam")
class LIFTCAM(_OfTail):
    """LIFT-CAM = ReLU(Σ_k w_k A_k) with w_k the sum over cells of A_k's DeepLIFT contributions to the score, with the
    reference A = 0 (Jung and Oh, ICCV 2021, section 4.2).

    On a network that ends in mean pooling and a linear layer, w_k = w_ck · (mean of A_k). On other networks the
    contributions come from DeepLIFT's rescale rule at functions of one value; other operations have their derivative.

    Raises:
        NotApplicable: if the contributions do not add up to the change of the score, because the layers after the
            target layer do something that the rescale rule does not cover.
    """

    needs = ("rescale_tail",)

    def _closed(self, a: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return w * a.mean(dim=(2, 3))

    def _general(self, inputs: Tensor, a: Tensor, targets: Tensor) -> Tensor:
        weights = []
        for i in range(len(a)):
            both = torch.stack([a[i], torch.zeros_like(a[i])]).to(inputs.dtype).requires_grad_(True)
            rules = Rescale(self.model, "liftcam", only=True)
            with torch.enable_grad(), rules:
                output = self._tail(inputs[i : i + 1], rules.start(both))
                scores = target_scores(output, self.score, targets[i].repeat(2))
            multiplier = gradient_of(scores[0], both, "the layer")
            contributions = (multiplier[0] * both[0]).detach().float()
            score, without = scores.detach()
            check_complete("liftcam", self.model, contributions[None], score[None], without[None], "after the layer, ")
            weights.append(contributions.sum(dim=(1, 2)))
        return torch.stack(weights)


def _guarded(y: Tensor) -> Tensor:
    """|y|, at least 1e-6, shaped to divide weights."""
    size = y.abs().clamp(min=1e-6)
    return size[:, None] if size.dim() else size
