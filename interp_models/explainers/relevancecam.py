"""Relevance-CAM."""

from dataclasses import dataclass

from torch import Tensor

from interp_models.core.maps import weighted
from interp_models.core.scoring import Target
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.layer_rules import AlphaBeta, Composite
from interp_models.explainers.of_layer import LayerExplainer
from interp_models.explainers.relevance import Relevance
from interp_models.explainers.relevance_at_layer import relevance_at

TINY = 1e-9
"""Added to denominators."""


@EXPLAINERS.register("relevancecam")
@dataclass(kw_only=True, eq=False, repr=False)
class RelevanceCAM(LayerExplainer):
    """Relevance-CAM = Σ_k w_k A_k, with w_k the mean over cells of channel k's relevance (Lee et al., CVPR 2021).

    Relevance starts as 1 at the target class and as -1/C at each other of the C classes, as in the authors' code. LRP
    with z⁺ (α = 1, β = 0, without biases) passes it down to the layer. So it also explains layers far from the last.

    Raises:
        NotApplicable: for a network with an operation without a rule after the layer.
    """

    needs = ("rules",)

    relu: bool = False
    """Keep positive evidence only; not in the paper."""

    def _signed(self, inputs: Tensor, target: Target) -> Tensor:
        plus = AlphaBeta(1.0, 0.0, TINY, bias=False)
        rules = Relevance(self.model, "relevancecam", Composite(plus, plus))
        a, r = relevance_at(self, rules, inputs, target, others=None)
        return weighted(r.mean(dim=(2, 3)), a)
