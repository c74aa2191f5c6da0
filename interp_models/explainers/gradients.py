"""Explainers by the derivative of the score with respect to the pixels."""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from interp_models.core.scoring import Score, Target, logits_of
from interp_models.explainers.base import EXPLAINERS, Explainer, gradient_of, target_scores
from interp_models.explainers.guided_rules import Backward, backward_rule
from interp_models.explainers.rules import Rules

Channels = Literal["sum", "abs_sum", "max_abs", "mean"]
"""Reduction of a pixel's colour channels: sum, sum of absolute values, maximum of absolute values, or mean."""


def reduced(raw: Tensor, channels: Channels) -> Tensor:
    """Reduce the channels: (B, c, h, w) -> (B, h, w).

    >>> raw = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
    >>> [reduced(raw, how).item() for how in ("sum", "abs_sum", "max_abs", "mean")]
    [-2.0, 4.0, 3.0, -1.0]
    """
    if channels == "sum":
        return raw.sum(dim=1)
    if channels == "mean":
        return raw.mean(dim=1)
    return raw.abs().sum(dim=1) if channels == "abs_sum" else raw.abs().amax(dim=1)


class PixelExplainer(Explainer, ABC):
    """Abstract: an explainer that gives one value per colour channel of each pixel, and reduces the channels last.

    A subclass implements `raw`.

    Args:
        model: any module that returns logits.
        channels: reduction of the colour channels, see `Channels`.
        score: explain the target's `logit` or its `probability`.
    """

    back_to_images = True

    def __init__(self, model: nn.Module, *, channels: Channels, score: Score) -> None:
        super().__init__(model, score=score)
        self.channels: Channels = channels

    @property
    def coloured(self) -> bool:
        """Whether `raw` has one value per colour channel of each pixel."""
        return True

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        return reduced(self.raw(self.model, inputs, target), self.channels)

    @abstractmethod
    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """Values (B, C, H, W) before the reduction. `model` is the explained model or a faster copy of it."""


def input_gradient(
    model: nn.Module, inputs: Tensor, target: Target, score: Score, rules: Rules | None = None
) -> Tensor:
    """∂y/∂x (B, C, H, W), by one forward and one backward pass.

    With rules, the pass follows them. The score itself, a softmax perhaps, has its own derivative.

    Raises:
        NotApplicable: if the score does not depend on the images through differentiable operations.
    """
    x = inputs.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        with nullcontext() if rules is None else rules:
            output = model(x if rules is None else rules.start(x))
        if rules is not None:
            rules.check(logits_of(output))
        total = target_scores(output, score, target).sum()
    return gradient_of(total, x, "the images")


@EXPLAINERS.register("gradient")
class Gradient(PixelExplainer):
    """Gradient: ∂y/∂x of the target's score y with respect to the image x, reduced to the largest absolute value over
    each pixel's colours (Simonyan et al., ICLR Workshops 2014, section 3.1).

    Args:
        model: any module that returns logits.
        channels: reduction of the colour channels; the paper uses `max_abs`.
        score: explain the target's `logit` or its `probability`.
    """

    def __init__(self, model: nn.Module, *, channels: Channels = "max_abs", score: Score = "logit") -> None:
        super().__init__(model, channels=channels, score=score)

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """The gradient."""
        return input_gradient(model, inputs, target, self.score)


@EXPLAINERS.register("grad_x_input")
class GradXInput(PixelExplainer):
    """Gradient × input: x ⊙ ∂y/∂x of the target's score y with respect to the image x (Shrikumar et al. 2016).

    For a ReLU network without biases the map sums to the score. The pixels x are those in [0, 1], before the model
    normalises them.

    Args:
        model: any module that returns logits.
        channels: reduction of the colour channels; `sum` keeps the sum over the image.
        score: explain the target's `logit` or its `probability`.
    """

    def __init__(self, model: nn.Module, *, channels: Channels = "sum", score: Score = "logit") -> None:
        super().__init__(model, channels=channels, score=score)

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """The gradient times the images."""
        return input_gradient(model, inputs, target, self.score) * inputs


class _OfRule(PixelExplainer, ABC):
    """Abstract: the gradient with a modified backward rule at activations."""

    needs = ("relu",)

    rule: Backward

    def __init__(
        self,
        model: nn.Module,
        *,
        activations: list[str] | None = None,
        channels: Channels = "max_abs",
        score: Score = "logit",
    ) -> None:
        super().__init__(model, channels=channels, score=score)
        self.activations = tuple(activations or ())

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """The modified gradient."""
        with backward_rule(model, self.rule, self.activations) as rules:
            return input_gradient(model, inputs, target, self.score, rules)


@EXPLAINERS.register("deconvnet")
class Deconvnet(_OfRule):
    """Deconvnet: the gradient, but every ReLU passes back ReLU(R) of the incoming gradient R (Zeiler and Fergus, ECCV
    2014, section 2.1).

    The sign of the ReLU's input does not matter, unlike for guided backpropagation.

    Args:
        model: any module that returns logits, with ReLU or ReLU6 as activations.
        activations: names of further activation classes that follow the rule, such as `SELU`.
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.

    Raises:
        NotApplicable: for a network with other activations, or without any.
    """

    rule = "deconvnet"


@EXPLAINERS.register("guided_backprop")
class GuidedBackprop(_OfRule):
    """Guided backpropagation: the gradient, but every ReLU passes back ReLU(R) of the incoming gradient R, and only
    where its input is above 0 (Springenberg et al., ICLR Workshops 2015).

    Args:
        model: any module that returns logits, with ReLU or ReLU6 as activations.
        activations: names of further activation classes that follow the rule, such as `SELU`. They pass back ReLU(R)
            where their output is above 0 (Nielsen et al., equation 4).
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.

    Raises:
        NotApplicable: for a network with other activations, or without any.
    """

    rule = "guided_backprop"
