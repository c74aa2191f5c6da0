"""Gradients and guided backpropagation, smoothed, integrated and both (Nielsen et al., sections II-A to II-E)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import nn

from interp_models.core.scoring import Score
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.combinators import Average, Integrate, NoiseScale, Quadrature, Smooth
from interp_models.explainers.gradients import Channels, Gradient, GuidedBackprop


@EXPLAINERS.register("integrated_gradients")
class IntegratedGradients(Integrate):
    """IG = (x - x') ⊙ ∫ ∂y/∂x at x' + α (x - x') dα (Sundararajan et al., ICML 2017, equations 1 and 3).

    With `channels: sum` maps add up to y(x) - y(x'), within the error of the quadrature.

    Args:
        model: any module that returns logits.
        steps: points of the path, of one forward and backward pass each (the paper: 20 to 300).
        quadrature: `riemann` takes the points k / steps (the paper's); `gauss_legendre` errs less by as many.
        baseline: x', the value of all its pixels; 0 is black.
        channels: how colours become one value; signed values add up.
        score: what is explained.
        batch: images per pass; None chooses by the device.
    """

    passes = "steps"
    small: ClassVar[Mapping[str, Any]] = {"steps": 3, "batch": 2}

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = 50,
        quadrature: Quadrature = "riemann",
        baseline: float = 0.0,
        channels: Channels = "sum",
        score: Score = "logit",
        batch: int | None = None,
    ) -> None:
        gradient = Gradient(model, score=score)
        super().__init__(
            gradient, steps=steps, quadrature=quadrature, baseline=baseline, channels=channels, batch=batch
        )


class _SmoothedGradient(Smooth):
    """Abstract: an average of gradients of noisy copies."""

    kind: Average

    def __init__(
        self,
        model: nn.Module,
        *,
        samples: int = 15,
        noise: float = 0.15,
        noise_scale: NoiseScale = "range",
        channels: Channels = "abs_sum",
        score: Score = "logit",
        seed: int = 0,
        batch: int | None = None,
    ) -> None:
        super().__init__(
            Gradient(model, score=score),
            samples=samples,
            noise=noise,
            noise_scale=noise_scale,
            average=self.kind,
            channels=channels,
            seed=seed,
            batch=batch,
        )


@EXPLAINERS.register("smoothgrad")
class SmoothGrad(_SmoothedGradient):
    """The mean gradient of noisy copies, (1/n) Σ ∂y/∂x at x + ε_i with ε_i ~ N(0, σ²) (Smilkov et al. 2017).

    Args:
        model: any module that returns logits.
        samples: n, of one forward and backward pass each.
        noise: σ, in units of `noise_scale` (the paper: 0.1 to 0.2 of the range).
        noise_scale: `range`, each image's highest less its lowest value (the paper's), or `absolute`.
        channels: how colours become one value.
        score: what is explained.
        seed: of the noise.
        batch: images per pass; None chooses by the device.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3}

    kind = "mean"


@EXPLAINERS.register("smoothgrad_squared")
class SmoothGradSquared(_SmoothedGradient):
    """The mean of the squared gradients of noisy copies (Hooker et al., NeurIPS 2019, section 4.1).

    Args:
        model: any module that returns logits.
        samples: n, of one forward and backward pass each.
        noise: σ, in units of `noise_scale`.
        noise_scale: `range`, each image's highest less its lowest value, or `absolute`.
        channels: how colours become one value.
        score: what is explained.
        seed: of the noise.
        batch: images per pass; None chooses by the device.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3}

    kind = "square"


@EXPLAINERS.register("vargrad")
class VarGrad(Smooth):
    """The variance of the maps of noisy copies, divided by their number (Adebayo et al., ICLR Workshops 2018).

    Args:
        model: any module that returns logits.
        of: the maps, `gradient` (the paper's) or `integrated_gradients` of 50 steps (the tutorial's).
        samples: n, of one forward and backward pass each; with integrated gradients, of 50.
        noise: σ, in units of `noise_scale`.
        noise_scale: `range`, each image's highest less its lowest value, or `absolute`.
        channels: how colours become one value.
        score: what is explained.
        seed: of the noise.
        batch: images per pass; None chooses by the device.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3, "batch": 5}

    def __init__(
        self,
        model: nn.Module,
        *,
        of: Literal["gradient", "integrated_gradients"] = "gradient",
        samples: int = 15,
        noise: float = 0.15,
        noise_scale: NoiseScale = "range",
        channels: Channels = "abs_sum",
        score: Score = "logit",
        seed: int = 0,
        batch: int | None = None,
    ) -> None:
        base = Gradient(model, score=score) if of == "gradient" else IntegratedGradients(model, score=score)
        super().__init__(
            base,
            samples=samples,
            noise=noise,
            noise_scale=noise_scale,
            average="variance",
            channels=channels,
            seed=seed,
            batch=batch,
        )


@EXPLAINERS.register("smoothed_integrated_gradients")
class SmoothedIntegratedGradients(Smooth):
    """The mean of the integrated gradients of noisy copies, whose factor x - x' is noisy, too (Nielsen et al.,
    equation 6).

    Args:
        model: any module that returns logits.
        steps: points of a path.
        samples: n, of `steps` forward and backward passes each.
        noise: σ, in units of `noise_scale`.
        noise_scale: `range`, each image's highest less its lowest value, or `absolute`.
        channels: how colours become one value; signed values add up.
        score: what is explained.
        seed: of the noise.
        batch: images per pass; None chooses by the device.
    """

    passes = "samples * steps"
    small: ClassVar[Mapping[str, Any]] = {"samples": 2, "steps": 3}

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = 50,
        samples: int = 15,
        noise: float = 0.15,
        noise_scale: NoiseScale = "range",
        channels: Channels = "sum",
        score: Score = "logit",
        seed: int = 0,
        batch: int | None = None,
    ) -> None:
        base = IntegratedGradients(model, steps=steps, score=score, batch=batch)
        super().__init__(
            base, samples=samples, noise=noise, noise_scale=noise_scale, channels=channels, seed=seed, batch=batch
        )


@EXPLAINERS.register("smoothed_guided_backprop")
class SmoothedGuidedBackprop(Smooth):
    """The mean of guided backpropagation of noisy copies (Nielsen et al., equation 7).

    Args:
        model: any module that returns logits, with ReLU or ReLU6 for activations.
        activations: classes of modules, beside ReLU and ReLU6, that follow the rule, such as `SELU`.
        samples: n, of one forward and backward pass each.
        noise: σ, in units of `noise_scale`.
        noise_scale: `range`, each image's highest less its lowest value, or `absolute`.
        channels: how colours become one value.
        score: what is explained.
        seed: of the noise.
        batch: images per pass; None chooses by the device.
    """

    needs = ("relu",)
    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3}

    def __init__(
        self,
        model: nn.Module,
        *,
        activations: list[str] | None = None,
        samples: int = 15,
        noise: float = 0.15,
        noise_scale: NoiseScale = "range",
        channels: Channels = "max_abs",
        score: Score = "logit",
        seed: int = 0,
        batch: int | None = None,
    ) -> None:
        base = GuidedBackprop(model, activations=activations, score=score)
        super().__init__(
            base, samples=samples, noise=noise, noise_scale=noise_scale, channels=channels, seed=seed, batch=batch
        )


@EXPLAINERS.register("integrated_smoothgrad")
class IntegratedSmoothGrad(Integrate):
    """(x - x') ⊙ the mean along the path of SmoothGrad's signed gradients (Nielsen et al., equation 8).

    Args:
        model: any module that returns logits.
        steps: points of the path, of `samples` forward and backward passes each.
        samples: noisy copies of a point.
        noise: σ, in units of `noise_scale`.
        noise_scale: `range`, each point's highest less its lowest value, or `absolute`.
        channels: how colours become one value; signed values add up.
        score: what is explained.
        seed: of the noise.
        batch: images per pass; None chooses by the device.
    """

    passes = "samples * steps"
    small: ClassVar[Mapping[str, Any]] = {"samples": 2, "steps": 3}

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = 50,
        samples: int = 15,
        noise: float = 0.15,
        noise_scale: NoiseScale = "range",
        channels: Channels = "sum",
        score: Score = "logit",
        seed: int = 0,
        batch: int | None = None,
    ) -> None:
        base = SmoothGrad(
            model, samples=samples, noise=noise, noise_scale=noise_scale, score=score, seed=seed, batch=batch
        )
        super().__init__(base, steps=steps, channels=channels, batch=batch)


@EXPLAINERS.register("integrated_guided_backprop")
class IntegratedGuidedBackprop(Integrate):
    """(x - x') ⊙ the mean of guided backpropagation along the path (Nielsen et al., equation 9).

    Args:
        model: any module that returns logits, with ReLU or ReLU6 for activations.
        activations: classes of modules, beside ReLU and ReLU6, that follow the rule, such as `SELU`.
        steps: points of the path, of one forward and backward pass each.
        channels: how colours become one value; signed values add up.
        score: what is explained.
        batch: images per pass; None chooses by the device.
    """

    needs = ("relu",)
    passes = "steps"
    small: ClassVar[Mapping[str, Any]] = {"steps": 3}

    def __init__(
        self,
        model: nn.Module,
        *,
        activations: list[str] | None = None,
        steps: int = 50,
        channels: Channels = "sum",
        score: Score = "logit",
        batch: int | None = None,
    ) -> None:
        base = GuidedBackprop(model, activations=activations, score=score)
        super().__init__(base, steps=steps, channels=channels, batch=batch)
