"""Averages of another explainer's maps: over noisy copies of an image, and along a path from a baseline to it."""

from abc import ABC
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from interp_models.core.batches import default_batch
from interp_models.core.errors import InputError
from interp_models.core.maps import at_least_float32
from interp_models.core.rng import seed_of
from interp_models.core.scoring import Target, logits_of, resolve_target
from interp_models.explainers.base import Explainer
from interp_models.explainers.features import shared_passes
from interp_models.explainers.gradients import Channels, PixelExplainer, reduced

Average = Literal["mean", "square", "variance"]
"""Average over noisy copies: mean, mean of squares, or variance (with divisor n)."""
NoiseScale = Literal["range", "absolute"]
"""Unit of the noise: each image's range (maximum minus minimum), or 1."""
Quadrature = Literal["riemann", "gauss_legendre"]
"""Points of a path: k / steps for k = 1 ... steps with equal weights, or the Gauss-Legendre points and weights."""


class Combinator(PixelExplainer, ABC):
    """Abstract: an average of another explainer's maps over modified images, which are made a few at a time.

    Args:
        base: any explainer. Values per colour channel are averaged per channel.
        channels: reduction of the colour channels after averaging; None takes the base's. It has no effect if the base
            has no values per channel.
        batch: images per call of the base; None chooses it for the device.
    """

    def __init__(self, base: Explainer, *, channels: Channels | None, batch: int | None) -> None:
        own = base.channels if isinstance(base, PixelExplainer) else "sum"
        super().__init__(base.model, channels=channels or own, score=base.score)
        if batch is not None and batch < 1:
            raise InputError(f"batch must be at least 1; got {batch}")
        self.base, self.batch = base, batch

    @property
    def coloured(self) -> bool:
        """Whether the base has one value per colour channel of each pixel."""
        return isinstance(self.base, PixelExplainer) and self.base.coloured

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        return reduced(self.raw(self.prepared(inputs), inputs, target), self.channels)

    def _raw_of_base(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        if isinstance(self.base, PixelExplainer):
            found = self.base.raw(model, inputs, target)
        else:
            asked, self.base.preparation = self.base.preparation, self.preparation
            try:
                with shared_passes():  # of its own, so that these images are not kept in the caller's
                    found = self.base._attribute(inputs, target)[:, None]
            finally:
                self.base.preparation = asked
        return at_least_float32(found.detach())


def pairs(inputs: Tensor, each: int, batch: int | None) -> tuple[Tensor, ...]:
    """Numbers of (sample, image) pairs, in chunks: sample 0 of every image, then sample 1, ..."""
    return torch.split(torch.arange(each * len(inputs), device=inputs.device), batch or default_batch(inputs))


def resolved(model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
    """The class of each image (B,). A missing target is predicted from the image itself, not from modified copies."""
    if isinstance(target, Tensor):
        return target.to(inputs.device)
    with torch.no_grad():
        return resolve_target(target, logits_of(model(inputs)))


class Smooth(Combinator):
    """(1/n) Σ_i M(x + ε_i) with ε_i ~ N(0, σ²), for the maps M of any explainer (Smilkov et al. 2017, section 3).

    Noise i depends on the seed and i only, so the result does not depend on the batch. Noisy copies are not clamped to
    [0, 1]. Without a target, the class is predicted from the image without noise.

    Args:
        base: any explainer.
        samples: number n of noisy copies.
        noise: standard deviation σ, in units of `noise_scale`.
        noise_scale: `range` (each image's maximum minus minimum) or `absolute`.
        average: `mean`, `square` (mean of squares) or `variance` (with divisor n).
        channels: reduction of the colour channels; None takes the base's.
        seed: seed of the noise.
        batch: images per call of the base; None chooses it for the device.

    Raises:
        InputError: for fewer than one sample, negative noise or an empty batch.
    """

    def __init__(
        self,
        base: Explainer,
        *,
        samples: int = 15,
        noise: float = 0.15,
        noise_scale: NoiseScale = "range",
        average: Average = "mean",
        channels: Channels | None = None,
        seed: int = 0,
        batch: int | None = None,
    ) -> None:
        super().__init__(base, channels=channels, batch=batch)
        if samples < 1 or not noise >= 0:
            raise InputError(f"samples must be at least 1 and noise not below 0; got {samples}, {noise}")
        self.samples, self.noise, self.noise_scale = samples, noise, noise_scale
        self.average, self.seed = average, seed

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """Return the average before the reduction of channels: (B, C, H, W) as the base gives it."""
        targets = resolved(model, inputs, target)
        sigma = sigmas(inputs, self.noise, self.noise_scale)
        for chunk in pairs(inputs, self.samples, self.batch):
            i, b = chunk // len(inputs), chunk % len(inputs)
            drawn = {n: noise_like(inputs[0], self.seed, n) for n in set(i.tolist())}
            noisy = inputs[b] + sigma[b] * torch.stack([drawn[n] for n in i.tolist()])
            found = self._raw_of_base(model, noisy, targets[b])
            if not chunk[0]:
                total, squares, first = (found.new_zeros(len(inputs), *found.shape[1:]) for _ in range(3))
            if self.average == "variance":  # differences from the first sample avoid cancellation
                first[b[i == 0]] = found[i == 0]
                found = found - first[b]
            total.index_add_(0, b, found)
            if self.average != "mean":
                squares.index_add_(0, b, found.square())
        if self.average == "mean":
            return total / self.samples
        squares = squares / self.samples
        return squares if self.average == "square" else (squares - (total / self.samples).square()).clamp(min=0)


def sigmas(inputs: Tensor, noise: float, scale: NoiseScale) -> Tensor:
    """The standard deviation of each image's noise, (B, 1, 1, 1)."""
    sigma = torch.full_like(inputs[:, :1, :1, :1], noise)
    if scale == "absolute":
        return sigma
    return sigma * (inputs.amax(dim=(1, 2, 3), keepdim=True) - inputs.amin(dim=(1, 2, 3), keepdim=True))


def noise_like(image: Tensor, seed: int, number: int) -> Tensor:
    """Standard normal noise (C, H, W), a function of the seed and a number only. It is drawn on the CPU so that it is
    the same on every device."""
    generator = torch.Generator().manual_seed(seed_of(seed, number))
    return torch.randn(image.shape, generator=generator).to(image)


class Integrate(Combinator):
    """(x - x') ⊙ ∫ M(x' + α (x - x')) dα over α from 0 to 1, for the maps M of any explainer.

    With gradients as M it is integrated gradients (Sundararajan et al., ICML 2017, equation 1). If M has no values per
    colour channel, the factor x - x' is left out. Without a target, the class is predicted from x.

    Args:
        base: any explainer.
        steps: number of points on the path.
        quadrature: `riemann` (k / steps for k = 1 ... steps, equal weights; equation 3 of the paper) or
            `gauss_legendre`.
        baseline: value of every pixel of the baseline x'; 0 is black.
        channels: reduction of the colour channels; None takes the base's.
        batch: images per call of the base; None chooses it for the device.

    Raises:
        InputError: for fewer than one step or an empty batch.
    """

    def __init__(
        self,
        base: Explainer,
        *,
        steps: int = 50,
        quadrature: Quadrature = "riemann",
        baseline: float = 0.0,
        channels: Channels | None = None,
        batch: int | None = None,
    ) -> None:
        super().__init__(base, channels=channels, batch=batch)
        if steps < 1:
            raise InputError(f"steps must be at least 1; got {steps}")
        self.steps, self.quadrature, self.baseline = steps, quadrature, baseline

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """Return the integral before the reduction of channels: (B, C, H, W) as the base gives it."""
        targets, change = resolved(model, inputs, target), inputs - self.baseline
        alphas, weights = (torch.as_tensor(x).to(inputs) for x in points(self.steps, self.quadrature))
        for chunk in pairs(inputs, self.steps, self.batch):
            t, b = chunk // len(inputs), chunk % len(inputs)
            found = self._raw_of_base(model, self.baseline + alphas[t].view(-1, 1, 1, 1) * change[b], targets[b])
            if not chunk[0]:
                total = found.new_zeros(len(inputs), *found.shape[1:])
            total.index_add_(0, b, weights[t].view(-1, 1, 1, 1).to(found) * found)
        return total * change if self.coloured else total


def points(steps: int, quadrature: Quadrature) -> tuple[np.ndarray, np.ndarray]:
    """Quadrature points in [0, 1], and their weights, which add up to 1.

    >>> [x.tolist() for x in points(2, "riemann")]
    [[0.5, 1.0], [0.5, 0.5]]
    """
    if quadrature == "riemann":
        return np.arange(1, steps + 1) / steps, np.full(steps, 1 / steps)
    x, weights = np.polynomial.legendre.leggauss(steps)
    return (x + 1) / 2, weights / 2
