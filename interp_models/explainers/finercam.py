"""Finer-CAM: what tells the target class from the classes that are most like it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.scoring import Target, resolve_target, scores_of
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.features import LayerExplainer, activations_and_gradients
from interp_models.explainers.forms import Reshape
from interp_models.explainers.layers import Fuse, LayerNames

ReferenceWeights = Literal["equal", "probability"]
"""Weights of the reference classes: equal, or proportional to their probabilities."""


@EXPLAINERS.register("finercam")
class FinerCAM(LayerExplainer):
    """Finer-CAM: Grad-CAM of the difference Σ_d v_d (y_c - α y_d) / Σ_d v_d of the target's logit y_c and those of the
    reference classes d (Zhang et al., CVPR 2025, section 3).

    The references are the classes whose logits are nearest to y_c, without c. A are the layer's feature maps; the
    weight of A_k is the mean over cells of the difference's gradient by A_k.

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer, or several; None finds the last feature map, see `layers.target_layer`.
        reshape: form of the layer's output, `nchw`, `nhwc`, `tokens` or a function; None finds out.
        fuse: `mean` or `max` of several layers' maps, each scaled to [0, 1] and resized to the finest grid.
        alpha: strength α of the comparison; 0 is Grad-CAM.
        references: number of reference classes; fewer if there are not so many.
        weights: v_d is `equal` for all, as in the paper, or the class's `probability`, through which the gradient
            passes, too, as in later code of the authors.
        relu: keep positive evidence only, as in the paper.

    Raises:
        NotApplicable: for a model with a single class.
    """

    small: ClassVar[Mapping[str, Any]] = {"references": 2}

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerNames = None,
        reshape: Reshape = None,
        fuse: Fuse = "mean",
        alpha: float = 0.6,
        references: int = 3,
        weights: ReferenceWeights = "equal",
        relu: bool = True,
    ) -> None:
        super().__init__(model, layer=layer, reshape=reshape, fuse=fuse, relu=relu)
        if references < 1 or not alpha >= 0:
            raise InputError(f"finercam: references must be at least 1, alpha not below 0; got {references}, {alpha}")
        self.alpha, self.references, self.weights = alpha, references, weights

    def _signed(self, inputs: Tensor, target: Target) -> Tensor:
        a, g = activations_and_gradients(self, inputs, target, lambda output: self._difference(output, target))
        return (g.mean(dim=(2, 3), keepdim=True) * a).sum(dim=1)

    def _difference(self, output: Any, target: Target) -> Tensor:
        """What is explained, (B,)."""
        logits = scores_of(output, "logit")
        if logits.shape[1] < 2:
            raise NotApplicable("finercam compares classes; the model has only one")
        targets = resolve_target(target, logits)[:, None]
        of_target = logits.gather(1, targets)
        apart = (logits - of_target).detach().abs().scatter(1, targets, torch.inf)
        nearest = apart.sort(dim=1, stable=True).indices[:, : min(self.references, logits.shape[1] - 1)]
        of_references = logits.gather(1, nearest)
        shares = of_references.softmax(dim=1)  # the probabilities, divided by their sum
        shares = shares if self.weights == "probability" else torch.full_like(shares, 1 / shares.shape[1])
        return of_target[:, 0] - self.alpha * (shares * of_references).sum(dim=1)
