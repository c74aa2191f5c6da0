"""Derivatives of the score by the pixels."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from interp_models.core.errors import NotApplicable
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS, Explainer, target_scores
from interp_models.explainers.rules import Rule, backward_rule

Channels = Literal["sum", "abs_sum", "max_abs", "mean"]
"""Reduction over a pixel's channels: sum, sum or maximum of absolute values, or mean."""


def reduced(raw: Tensor, channels: Channels) -> Tensor:
    """(B, c, h, w) -> (B, h, w); one channel stays as it is, but for its sign where sizes are asked for.

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
    """Abstract: an explainer with a value for every colour of every pixel, which are reduced to one at the end.

    Args:
        model: any module that returns logits.
        channels: see `Channels`.
        score: what is explained.
    """

    back_to_images = True

    def __init__(self, model: nn.Module, *, channels: Channels, score: Score) -> None:
        super().__init__(model, score=score)
        self.channels: Channels = channels

    @property
    def coloured(self) -> bool:
        """Whether there is a value for every colour of every pixel."""
        return True

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        return reduced(self.raw(self.model, inputs, target), self.channels)

    @abstractmethod
    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """(B, C, H, W), of the explained model or of a copy that passes images faster."""


def input_gradient(model: nn.Module, inputs: Tensor, target: Target, score: Score) -> Tensor:
    """∂y/∂x (B, C, H, W) by one forward and backward pass.

    Raises:
        NotApplicable: if the score does not depend on the images through differentiable operations.
    """
    x = inputs.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        total = target_scores(model(x), score, target).sum()
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, x, allow_unused=True)
    if gradient is None:
        raise NotApplicable("no gradient path from the score back to the images")
    return gradient


@EXPLAINERS.register("gradient")
class Gradient(PixelExplainer):
    """∂y/∂x, of each pixel the largest size over its colours (Simonyan et al., ICLR Workshops 2014, section 3.1).

    Args:
        model: any module that returns logits.
        channels: how colours become one value; the paper's is `max_abs`.
        score: what is explained.
    """

    def __init__(self, model: nn.Module, *, channels: Channels = "max_abs", score: Score = "logit") -> None:
        super().__init__(model, channels=channels, score=score)

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """The gradient."""
        return input_gradient(model, inputs, target, self.score)


@EXPLAINERS.register("grad_x_input")
class GradXInput(PixelExplainer):
    """x ⊙ ∂y/∂x, which for a network of ReLUs without biases adds up to the score (Shrikumar et al. 2016).

    x are the pixels as the model takes them here, from 0 (black) to 1.

    Args:
        model: any module that returns logits.
        channels: how colours become one value; signed values add up.
        score: what is explained.
    """

    def __init__(self, model: nn.Module, *, channels: Channels = "sum", score: Score = "logit") -> None:
        super().__init__(model, channels=channels, score=score)

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """The gradient times the images."""
        return input_gradient(model, inputs, target, self.score) * inputs


class _OfRule(PixelExplainer, ABC):
    """Abstract: a gradient by another rule at activations.

    Args:
        model: any module that returns logits.
        activations: classes of modules, beside ReLU and ReLU6, that follow the rule, such as `SELU`.
        channels: how colours become one value.
        score: what is explained.
    """

    needs = ("relu",)

    rule: Rule

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
        """The gradient by the rule."""
        with backward_rule(model, self.rule, self.activations) as check:
            found = input_gradient(model, inputs, target, self.score)
            check()
        return found


@EXPLAINERS.register("deconvnet")
class Deconvnet(_OfRule):
    """The gradient with R where R > 0 at every ReLU, whatever its input (Zeiler and Fergus, ECCV 2014, section 2.1).

    Args:
        model: any module that returns logits, with ReLU or ReLU6 for activations.
        activations: classes of modules, beside ReLU and ReLU6, that follow the rule, such as `SELU`.
        channels: how colours become one value.
        score: what is explained.
    """

    rule = "deconvnet"


@EXPLAINERS.register("guided_backprop")
class GuidedBackprop(_OfRule):
    """The gradient with R where R > 0 and the ReLU lets its input through (Springenberg et al., ICLR Workshops 2015).

    Args:
        model: any module that returns logits, with ReLU or ReLU6 for activations.
        activations: classes of modules, beside ReLU and ReLU6, that follow the rule: R where R > 0 and their output is
            above 0 (Nielsen et al., equation 4).
        channels: how colours become one value.
        score: what is explained.
    """

    rule = "guided"
