"""Layer-wise relevance propagation (LRP)."""

from typing import Literal

from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.scoring import Target
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.gradients import Channels, PixelExplainer, input_gradient
from interp_models.explainers.layer_rules import AlphaBeta, Box, Composite, Epsilon, Flat, Gamma
from interp_models.explainers.relevance import Relevance, finite

CompositeName = Literal["epsilon", "epsilon_plus", "epsilon_gamma_box", "epsilon_alpha2_beta1", "epsilon_plus_flat"]
"""Rules of dense layers (always ε), of convolutions (ε, z⁺, γ, α = 2 and β = 1, z⁺), and of the first layer if that has
a rule of its own (box, flat)."""
TINY = 1e-9
"""Added to denominators of other rules than ε."""


@EXPLAINERS.register("lrp")
class LRP(PixelExplainer):
    """LRP: the score's relevance R = y, propagated layer by layer down to the pixels (Bach et al., PLOS ONE 2015).

    `layer_rules` and `relevance` contain the rules. Composites are those of Kohlbrenner et al. (IJCNN 2020) and
    Montavon et al. (2019). If the network normalises its images, relevance is that of the normalised pixels. With ε
    = 0 and without biases, the map of `composite: epsilon` adds up to the score.

    Args:
        model: any module that returns logits, with rules for all its operations.
        composite: the rules of its layers, see `CompositeName`.
        epsilon: ε of dense layers, and of all layers with `composite: epsilon`.
        gamma: γ of `epsilon_gamma_box`.
        channels: reduction of the colour channels; `sum` keeps the sum over the image.

    Raises:
        NotApplicable: for a network with an operation without a rule.
        InputError: for `epsilon_gamma_box` if images are not in [0, 1], because black and white bound the box.
    """

    needs = ("rules",)

    def __init__(
        self,
        model: nn.Module,
        *,
        composite: CompositeName = "epsilon_plus_flat",
        epsilon: float = 1e-6,
        gamma: float = 0.25,
        channels: Channels = "sum",
    ) -> None:
        super().__init__(model, channels=channels, score="logit")
        if not (epsilon >= 0 and gamma >= 0):
            raise InputError(f"lrp: epsilon and gamma must be at least 0; got {epsilon} and {gamma}")
        self.composite: CompositeName = composite
        dense, plus = Epsilon(epsilon), AlphaBeta(1.0, 0.0, TINY)
        self._composite = {
            "epsilon": Composite(dense, dense),
            "epsilon_plus": Composite(plus, dense),
            "epsilon_gamma_box": Composite(Gamma(gamma, TINY), dense, Box(TINY)),
            "epsilon_alpha2_beta1": Composite(AlphaBeta(2.0, 1.0, TINY), dense),
            "epsilon_plus_flat": Composite(plus, dense, Flat(TINY)),
        }[composite]

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """The relevance of every colour of every pixel."""
        if self.composite == "epsilon_gamma_box" and not (float(inputs.min()) >= 0 and float(inputs.max()) <= 1):
            raise InputError("lrp: composite epsilon_gamma_box needs images in [0, 1]; let the model normalise them")
        rules = Relevance(model, "lrp", self._composite)
        return finite(input_gradient(model, inputs, target, self.score, rules), rules)
