"""Gradients and guided backpropagation, smoothed and integrated (Nielsen et al., sections II-A to II-E)."""

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

    x is the image, x' the baseline, and y the target's score; α runs from 0 to 1. With `channels: sum`, a map sums to
    y(x) - y(x') up to the quadrature error.

    Args:
        model: any module that returns logits.
        steps: number of points on the path, with one forward and one backward pass each (paper: 20 to 300).
        quadrature: `riemann` takes the points k / steps (as in the paper); `gauss_legendre` has a smaller error for
            the same number of points.
        baseline: value of every pixel of the baseline x'; 0 is black.
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.
        batch: images per forward pass; None chooses it for the device.
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
    """Abstract: an average of the gradients at noisy copies."""

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
    """SmoothGrad = (1/n) Σ_i ∂y/∂x at x + ε_i with ε_i ~ N(0, σ²) (Smilkov et al. 2017).

    x is the image, and y is the target's score.

    Args:
        model: any module that returns logits.
        samples: number n of noisy copies, with one forward and one backward pass each.
        noise: standard deviation σ of the noise, in units of `noise_scale` (paper: 0.1 to 0.2 of the range).
        noise_scale: `range` (each image's maximum minus minimum, as in the paper) or `absolute`.
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.
        seed: seed of the noise.
        batch: images per forward pass; None chooses it for the device.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3}

    kind = "mean"


@EXPLAINERS.register("smoothgrad_squared")
class SmoothGradSquared(_SmoothedGradient):
    """SmoothGrad² = (1/n) Σ_i (∂y/∂x)² at x + ε_i with ε_i ~ N(0, σ²) (Hooker et al., NeurIPS 2019, section 4.1).

    x is the image, and y is the target's score.

    Args:
        model: any module that returns logits.
        samples: number n of noisy copies, with one forward and one backward pass each.
        noise: standard deviation σ of the noise, in units of `noise_scale`.
        noise_scale: `range` (each image's maximum minus minimum) or `absolute`.
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.
        seed: seed of the noise.
        batch: images per forward pass; None chooses it for the device.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3}

    kind = "square"


@EXPLAINERS.register("vargrad")
class VarGrad(Smooth):
    """VarGrad: the variance, with divisor n, of the maps of n noisy copies x + ε_i, ε_i ~ N(0, σ²) (Adebayo et al.,
    ICLR Workshops 2018).

    Args:
        model: any module that returns logits.
        of: the maps: `gradient` (as in the paper) or `integrated_gradients` with 50 steps (as in the tutorial).
        samples: number n of noisy copies. Each takes one forward and one backward pass; with integrated gradients, 50.
        noise: standard deviation σ of the noise, in units of `noise_scale`.
        noise_scale: `range` (each image's maximum minus minimum) or `absolute`.
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.
        seed: seed of the noise.
        batch: images per forward pass; None chooses it for the device.
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
    """The mean of integrated gradients over n noisy copies x + ε_i of the image (Nielsen et al., equation 6).

    The factor x - x' of integrated gradients contains the noise, too: it is x + ε_i - x'.

    Args:
        model: any module that returns logits.
        steps: number of points on each path.
        samples: number n of noisy copies, with `steps` forward and backward passes each.
        noise: standard deviation σ of the noise, in units of `noise_scale`.
        noise_scale: `range` (each image's maximum minus minimum) or `absolute`.
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.
        seed: seed of the noise.
        batch: images per forward pass; None chooses it for the device.
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
    """The mean of guided backpropagation over n noisy copies x + ε_i of the image (Nielsen et al., equation 7).

    Args:
        model: any module that returns logits, with ReLU or ReLU6 as activations.
        activations: names of further activation classes that follow the rule, such as `SELU`.
        samples: number n of noisy copies, with one forward and one backward pass each.
        noise: standard deviation σ of the noise, in units of `noise_scale`.
        noise_scale: `range` (each image's maximum minus minimum) or `absolute`.
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.
        seed: seed of the noise.
        batch: images per forward pass; None chooses it for the device.
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
    """(x - x') ⊙ the mean of SmoothGrad's signed gradients along the path from x' to x (Nielsen et al., equation 8).

    x is the image, and the baseline x' is black.

    Args:
        model: any module that returns logits.
        steps: number of points on the path, with `samples` forward and backward passes each.
        samples: number of noisy copies per point.
        noise: standard deviation σ of the noise, in units of `noise_scale`.
        noise_scale: `range` (maximum minus minimum of each image on the path) or `absolute`.
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.
        seed: seed of the noise.
        batch: images per forward pass; None chooses it for the device.
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
    """(x - x') ⊙ the mean of guided backpropagation along the path from x' to x (Nielsen et al., equation 9).

    x is the image, and the baseline x' is black.

    Args:
        model: any module that returns logits, with ReLU or ReLU6 as activations.
        activations: names of further activation classes that follow the rule, such as `SELU`.
        steps: number of points on the path, with one forward and one backward pass each.
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.
        batch: images per forward pass; None chooses it for the device.
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
