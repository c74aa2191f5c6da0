"""Finer-CAM: what tells the target class from the classes that are most like it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.scoring import Target, resolve_target, scores_of
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.features import activations_and_gradients
from interp_models.explainers.of_layer import LayerExplainer

ReferenceWeights = Literal["equal", "probability"]
"""Weights of the reference classes: equal, or proportional to their probabilities."""


@EXPLAINERS.register("finercam")
@dataclass(kw_only=True, eq=False, repr=False)
class FinerCAM(LayerExplainer):
    """Finer-CAM: Grad-CAM of the difference Σ_d v_d (y_c - α y_d) / Σ_d v_d of the target's logit y_c and those of the
    reference classes d (Zhang et al., CVPR 2025).

    The references are the classes whose logits are nearest to y_c, without c. A are the layer's feature maps; the
    weight of A_k is the mean over cells of the difference's gradient with respect to A_k.

    Raises:
        NotApplicable: for a model with a single class.
    """

    small: ClassVar[Mapping[str, Any]] = {"references": 2}

    alpha: float = 0.6
    """Strength α of the comparison; 0 is Grad-CAM."""
    references: int = 3
    """Number of reference classes; fewer if there are not so many."""
    weights: ReferenceWeights = "equal"
    """v_d is `equal` for all, as in the paper, or the class's `probability`, through which the gradient passes, too, as
    in later code of the authors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.references < 1 or not self.alpha >= 0:
            raise InputError(
                f"finercam: references must be at least 1, alpha not below 0; got {self.references}, {self.alpha}"
            )

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
