"""Score-CAM: feature maps weighted by the score of the image that they mask."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from interp_models.core.batches import scores_of_variants
from interp_models.core.errors import InputError
from interp_models.core.maps import stretched, weighted
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.features import activations
from interp_models.explainers.of_layer import OfLayer


@EXPLAINERS.register("scorecam")
@dataclass(kw_only=True, eq=False, repr=False)
class ScoreCAM(OfLayer):
    """Score-CAM = ReLU(Σ_k w_k A_k), with w_k from the score u_k of the image masked by A_k (Wang et al., CVPR
    Workshops 2020, algorithm 1).

    A are the layer's feature maps. The mask H_k is A_k, upsampled bilinearly and min-max normalised to [0, 1]; u_k is
    the score of x ⊙ H_k. Constant channels have the weight 0. Each channel takes one pass. Masked images are made a few
    at a time, so memory does not grow with the number of channels. The map has the layer's resolution.
    """

    passes = "channels + 1"

    weights: Literal["softmax", "increase"] = "softmax"
    """`softmax` is w = softmax over channels of u (the paper's algorithm, with logits). `increase` is w_k = u_k minus
    the score of a black image (with `score: probability` close to the authors' code, which subtracts nothing)."""
    score: Score = "logit"
    """u is the target's `logit` or its `probability`."""
    batch: int | None = None
    """Masked images per forward pass; None chooses it for the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch is not None and self.batch < 1:
            raise InputError(f"scorecam needs batch >= 1; got {self.batch}")

    @torch.no_grad()
    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        a, targets = activations(self, inputs, target)  # (B, C, h, w)
        score, size = self.score_fn(inputs), (inputs.shape[-2], inputs.shape[-1])

        def masked(b: Tensor, channel: Tensor) -> Tensor:
            return inputs[b] * stretched(a[b, channel], size).to(inputs.dtype)

        u = scores_of_variants(score, inputs, a.shape[1], masked, targets, self.batch).to(a.dtype)
        constant = a.amin(dim=(2, 3)) == a.amax(dim=(2, 3))
        if self.weights == "softmax":
            u = u.masked_fill(constant, -torch.inf)
            weights = u.softmax(dim=1).nan_to_num(nan=0.0)  # NaN if all channels are constant
        else:
            black = score(torch.zeros_like(inputs[:1])).expand(len(a), -1)
            weights = (u - black.gather(1, targets[:, None]).to(u.dtype)).masked_fill(constant, 0.0)
        return weighted(weights, a).relu()
