"""Gradients and guided backpropagation, smoothed and integrated (Nielsen et al., sections II-A to II-E).

The fields of a class are its options; `mixed` says which average of which explainer it is, see `combinators`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS, check_choices
from interp_models.explainers.combinators import Average, Combinator, Integrate, NoiseScale, Quadrature, Smooth
from interp_models.explainers.gradients import Channels, Gradient, GuidedBackprop, PixelExplainer, reduced


@dataclass(eq=False, repr=False)
class _Mixture(PixelExplainer, ABC):
    """Abstract: an average of an explainer's maps, under its own name."""

    model: nn.Module
    """Any module that returns logits."""
    _: KW_ONLY
    channels: Channels = "sum"
    """Reduction of the colour channels."""
    score: Score = "logit"
    """Explain the target's `logit` or its `probability`."""
    batch: int | None = None
    """Images per forward pass; None chooses it for the device."""

    def __post_init__(self) -> None:
        check_choices(type(self), vars(self))
        super().__init__(self.model, channels=self.channels, score=self.score)
        self._mixed = self.mixed()

    @abstractmethod
    def mixed(self) -> Combinator:
        """The average, whose channels are not yet reduced."""

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        return reduced(self.raw(self.prepared(inputs), inputs, target), self.channels)

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """The average (B, C, H, W) before the reduction of channels."""
        return self._mixed.raw(model, inputs, target)


@dataclass(kw_only=True, eq=False, repr=False)
class _OfGuided(_Mixture, ABC):
    """Abstract: an average of guided backpropagation."""

    needs = ("relu",)

    activations: list[str] | None = None
    """Names of further activation classes that follow the rule, such as `SELU`."""

    def guided(self) -> GuidedBackprop:
        """What is averaged."""
        return GuidedBackprop(self.model, activations=self.activations, score=self.score)


@dataclass(kw_only=True, eq=False, repr=False)
class _OnPath(_Mixture, ABC):
    """Abstract: with an average along a path."""

    steps: int = 50
    """Number of points on each path (paper of integrated gradients: 20 to 300)."""


@dataclass(kw_only=True, eq=False, repr=False)
class _OfNoise(_Mixture, ABC):
    """Abstract: with an average over noisy copies."""

    samples: int = 15
    """Number n of noisy copies, of each point if there is a path."""
    noise: float = 0.15
    """Standard deviation σ of the noise, in units of `noise_scale` (paper of SmoothGrad: 0.1 to 0.2 of the range)."""
    noise_scale: NoiseScale = "range"
    """`range` (maximum minus minimum of each image to which noise is added) or `absolute`."""
    seed: int = 0
    """Seed of the noise."""

    def smooth(self, base: PixelExplainer, average: Average = "mean") -> Smooth:
        """The average of a base."""
        return Smooth(
            base,
            samples=self.samples,
            noise=self.noise,
            noise_scale=self.noise_scale,
            average=average,
            seed=self.seed,
            batch=self.batch,
        )


@EXPLAINERS.register("integrated_gradients")
@dataclass(kw_only=True, eq=False, repr=False)
class IntegratedGradients(_OnPath):
    """IG = (x - x') ⊙ ∫ ∂y/∂x at x' + α (x - x') dα (Sundararajan et al., ICML 2017, equations 1 and 3).

    x is the image, x' the baseline, and y the target's score; α runs from 0 to 1. With `channels: sum`, a map sums to
    y(x) - y(x') up to the quadrature error. Each point takes one forward and one backward pass.
    """

    passes = "steps"
    small: ClassVar[Mapping[str, Any]] = {"steps": 3, "batch": 2}

    quadrature: Quadrature = "riemann"
    """`riemann` takes the points k / steps (as in the paper); `gauss_legendre` has a smaller error for the same number
    of points."""
    baseline: float = 0.0
    """Value of every pixel of the baseline x'; 0 is black."""

    def mixed(self) -> Combinator:
        """Gradients along the path."""
        gradient = Gradient(self.model, score=self.score)
        return Integrate(
            gradient, steps=self.steps, quadrature=self.quadrature, baseline=self.baseline, batch=self.batch
        )


@EXPLAINERS.register("smoothgrad")
@dataclass(kw_only=True, eq=False, repr=False)
class SmoothGrad(_OfNoise):
    """SmoothGrad = (1/n) Σ_i ∂y/∂x at x + ε_i with ε_i ~ N(0, σ²) (Smilkov et al. 2017).

    x is the image, and y is the target's score. Each copy takes one forward and one backward pass.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3}

    channels: Channels = "abs_sum"

    def mixed(self) -> Combinator:
        """The mean of gradients."""
        return self.smooth(Gradient(self.model, score=self.score))


@EXPLAINERS.register("smoothgrad_squared")
@dataclass(kw_only=True, eq=False, repr=False)
class SmoothGradSquared(_OfNoise):
    """SmoothGrad² = (1/n) Σ_i (∂y/∂x)² at x + ε_i with ε_i ~ N(0, σ²) (Hooker et al., NeurIPS 2019, section 4.1).

    x is the image, and y is the target's score. Each copy takes one forward and one backward pass.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3}

    channels: Channels = "abs_sum"

    def mixed(self) -> Combinator:
        """The mean of squared gradients."""
        return self.smooth(Gradient(self.model, score=self.score), "square")


@EXPLAINERS.register("vargrad")
@dataclass(kw_only=True, eq=False, repr=False)
class VarGrad(_OfNoise):
    """VarGrad: the variance, with divisor n, of the maps of n noisy copies x + ε_i, ε_i ~ N(0, σ²) (Adebayo et al.,
    ICLR Workshops 2018).

    Each copy takes one forward and one backward pass; with integrated gradients, 50.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3, "batch": 5}

    channels: Channels = "abs_sum"
    of: Literal["gradient", "integrated_gradients"] = "gradient"
    """The maps: `gradient` (as in the paper) or `integrated_gradients` with 50 steps (as in the tutorial)."""

    def mixed(self) -> Combinator:
        """The variance of gradients, or of integrated gradients."""
        if self.of == "gradient":
            return self.smooth(Gradient(self.model, score=self.score), "variance")
        return self.smooth(IntegratedGradients(self.model, score=self.score, batch=self.batch), "variance")


@EXPLAINERS.register("smoothed_integrated_gradients")
@dataclass(kw_only=True, eq=False, repr=False)
class SmoothedIntegratedGradients(_OfNoise, _OnPath):
    """The mean of integrated gradients over n noisy copies x + ε_i of the image (Nielsen et al., equation 6).

    The factor x - x' of integrated gradients contains the noise, too: it is x + ε_i - x'. Each copy takes `steps`
    forward and backward passes.
    """

    passes = "samples * steps"
    small: ClassVar[Mapping[str, Any]] = {"samples": 2, "steps": 3}

    def mixed(self) -> Combinator:
        """The mean of integrated gradients."""
        return self.smooth(IntegratedGradients(self.model, steps=self.steps, score=self.score, batch=self.batch))


@EXPLAINERS.register("smoothed_guided_backprop")
@dataclass(kw_only=True, eq=False, repr=False)
class SmoothedGuidedBackprop(_OfNoise, _OfGuided):
    """The mean of guided backpropagation over n noisy copies x + ε_i of the image (Nielsen et al., equation 7).

    Each copy takes one forward and one backward pass. The activations of the model must be ReLU or ReLU6.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3}

    channels: Channels = "max_abs"

    def mixed(self) -> Combinator:
        """The mean of guided backpropagation."""
        return self.smooth(self.guided())


@EXPLAINERS.register("integrated_smoothgrad")
@dataclass(kw_only=True, eq=False, repr=False)
class IntegratedSmoothGrad(_OfNoise, _OnPath):
    """(x - x') ⊙ the mean of SmoothGrad's signed gradients along the path from x' to x (Nielsen et al., equation 8).

    x is the image, and the baseline x' is black. Each point takes `samples` forward and backward passes.
    """

    passes = "samples * steps"
    small: ClassVar[Mapping[str, Any]] = {"samples": 2, "steps": 3}

    def mixed(self) -> Combinator:
        """Signed means of gradients along the path."""
        means = self.smooth(Gradient(self.model, score=self.score))
        return Integrate(means, steps=self.steps, batch=self.batch)


@EXPLAINERS.register("integrated_guided_backprop")
@dataclass(kw_only=True, eq=False, repr=False)
class IntegratedGuidedBackprop(_OnPath, _OfGuided):
    """(x - x') ⊙ the mean of guided backpropagation along the path from x' to x (Nielsen et al., equation 9).

    x is the image, and the baseline x' is black. Each point takes one forward and one backward pass. The activations of
    the model must be ReLU or ReLU6.
    """

    passes = "steps"
    small: ClassVar[Mapping[str, Any]] = {"steps": 3}

    def mixed(self) -> Combinator:
        """Guided backpropagation along the path."""
        return Integrate(self.guided(), steps=self.steps, batch=self.batch)
