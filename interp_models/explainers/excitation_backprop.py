"""Excitation backpropagation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.errors import NotApplicable
from interp_models.core.prepared import class_name
from interp_models.core.scoring import Target
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.calls import Call, Kept
from interp_models.explainers.guided_rules import clamped
from interp_models.explainers.layer_rules import AlphaBeta, Composite, Layer, Spread, share
from interp_models.explainers.of_layer import OfLayer
from interp_models.explainers.operations import SIGMOIDS
from interp_models.explainers.relevance import Relevance, elementwise
from interp_models.explainers.relevance_at_layer import relevance_at

TINY = 1e-12
"""Added to denominators."""


class Excitation(Relevance):
    """Probabilities of winning, from each neuron to its inputs: P(j | i) = x_j w⁺_ij / Σ_j x_j w⁺_ij, and 0 if the sum
    is 0 (Zhang et al.). Sums and averages count as layers with weights of 1.

    Args:
        model: the network.
        contrast: whether the last layer's own probabilities are those of w, minus those of -w.
    """

    def __init__(self, model: nn.Module, *, contrast: bool) -> None:
        plus = AlphaBeta(1.0, 0.0, TINY, bias=False)
        super().__init__(
            model,
            "excitation_backprop",
            Composite(plus, plus),
            without=("product", "quotient", "norm", "softmax", "attention", "gated", "either"),
            others={"sum": self.sums, "scale": self.scales, "elementwise": self.activation},
        )
        self.contrast = contrast
        self._last: dict[Any, list[bool]] = {}

    def spreading(self, call: Call, found: tuple[Any, Any, Any], rule: Spread) -> Tensor:
        """The output of a layer, with the rule of its place."""
        last, against = [False], AlphaBeta(1.0, 1.0, TINY, bias=False)

        def placed(layer: Layer, r: Tensor) -> Tensor:
            return against(layer, r) if self.contrast and last[0] else rule(layer, r)

        result = super().spreading(call, found, placed)
        self._last[result.grad_fn] = last
        return result

    def check(self, score: Tensor) -> None:
        """As of the base class; and find the last layers with weights."""
        super().check(score)
        waiting, seen = [score.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._last:
                self._last[node][0] = True
            else:
                waiting += [parent for parent, _ in node.next_functions]

    def activation(self, call: Call) -> Any:
        """A function whose values are not negative."""
        if clamped(call)[0] == 0.0 or call.name in SIGMOIDS or call.name in ("softplus", "logit"):
            return elementwise(call)
        return call.refused(f"has {call.name}, but {self.method} needs activations that are never negative")

    def scales(self, call: Call) -> Any:
        """A multiple by constants that are not negative."""
        others = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor | int | float)]
        constant = [x for x in others if all(x is not one for one in call.operands)]
        if any(bool((torch.as_tensor(x) < 0).any()) for x in constant):
            return call.refused(f"multiplies features by a negative number, which {self.method} has no rule for")
        return call.plain()

    def sums(self, call: Call) -> Any:
        """A sum, whose probabilities go to what it adds up in proportion."""
        if call.name in ("sub", "subtract", "rsub", "neg", "negative"):
            return call.refused(f"has {call.name}, a difference of features, which {self.method} has no rule for")
        value = call.value()
        z = self.keep(value)
        kept = [Kept(x.detach().clone()) if call.in_place else self.keep(x) for x in call.operands]

        def back(m: Tensor) -> list[Tensor]:
            with torch.enable_grad():
                leaves = [one.value.clamp(min=0).requires_grad_(True) for one in kept]
                total = call.of(*leaves)
            with torch.no_grad():  # constants take nothing
                without = call.of(*(torch.zeros_like(one.value) for one in kept))
            given = torch.autograd.grad(total, leaves, share(m * z.value, total.detach() - without, TINY))
            return [torch.where(one.value > 0, part, 0.0) for one, part in zip(kept, given, strict=True)]

        return call.ruled(back, value)


@EXPLAINERS.register("excitation_backprop")
@dataclass(kw_only=True, eq=False, repr=False)
class ExcitationBackprop(OfLayer):
    """Excitation backpropagation: the probability that a neuron of the layer wins, from 1 at the target class, summed
    over the channels of each cell (Zhang et al., ECCV 2016).

    Each neuron passes its probability to its inputs x_j in proportion to x_j w⁺_ij. With `contrast`, the probabilities
    of the dual class, whose weights in the last layer are -w, are subtracted, and the positive part is kept (section
    3.3). Without it, the map sums to 1 if every neuron has an input with x_j w⁺_ij > 0. The network's activations must
    never be negative.

    Raises:
        NotApplicable: for a network with an operation without a rule after the layer, or if the layer has negative
            values.
    """

    needs = ("relu",)

    contrast: bool = True
    """Subtract the probabilities of the dual class."""

    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        rules = Excitation(self.model, contrast=self.contrast)
        a, r = relevance_at(self, rules, inputs, target, others=0.0)
        if bool((a < 0).any()):
            raise NotApplicable(
                f"layer {self.target_layer(inputs).name} of {class_name(self.model)} has negative values; "
                "excitation_backprop needs a layer without them, such as one after a ReLU"
            )
        maps = r.sum(dim=1)
        return maps.relu() if self.contrast else maps
