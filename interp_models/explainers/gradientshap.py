"""GradientSHAP: integrated gradients in expectation, over baselines and points of the path."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.rng import seed_of, uniform
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.combinators import pairs, resolved
from interp_models.explainers.gradients import Channels, PixelExplainer, input_gradient, reduced


@EXPLAINERS.register("gradientshap")
class GradientSHAP(PixelExplainer):
    """GradientSHAP = (1/n) Σ_i (x_i - x'_i) ⊙ ∂y/∂x at x'_i + α_i (x_i - x'_i), also known as expected gradients (Erion
    et al., Nature Machine Intelligence 2021; Lundberg and Lee, NeurIPS 2017).

    α_i is uniform in [0, 1], x_i = x + ε_i is the image x with noise ε_i ~ N(0, σ²), and x'_i is a baseline. Draws
    depend on the seed and i only, so the result does not depend on the batch. With `channels: sum`, the expected sum of
    a map is the mean of y(x_i) - y(x'_i). Each sample takes one forward and one backward pass.

    Args:
        model: any module that returns logits.
        samples: number n.
        baselines: values from which each sample draws one for all pixels of its baseline; 0 is black. None draws each
            value of a baseline uniformly from [0, 1].
        noise: standard deviation σ of the noise, in the unit of the pixels.
        channels: reduction of the colour channels.
        score: explain the target's `logit` or its `probability`.
        seed: seed of the draws.
        batch: images per forward pass; None chooses it for the device.

    Raises:
        InputError: for fewer than one sample, no baseline, negative noise or an empty batch.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 5, "batch": 4}

    def __init__(
        self,
        model: nn.Module,
        *,
        samples: int = 50,
        baselines: list[float] | None = None,
        noise: float = 0.0,
        channels: Channels = "sum",
        score: Score = "logit",
        seed: int = 0,
        batch: int | None = None,
    ) -> None:
        super().__init__(model, channels=channels, score=score)
        empty = baselines is not None and not len(baselines)
        if samples < 1 or not noise >= 0 or (batch is not None and batch < 1) or empty:
            raise InputError(
                "gradientshap: samples and batch must be at least 1, noise at least 0, and baselines not empty; got "
                f"{samples}, {batch}, {noise}, {baselines}"
            )
        self.samples, self.baselines, self.noise = samples, baselines, noise
        self.seed, self.batch = seed, batch

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        return reduced(self.raw(self.prepared(inputs), inputs, target), self.channels)

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """The mean (B, C, H, W)."""
        targets = resolved(model, inputs, target)
        total = torch.zeros_like(inputs, dtype=torch.promote_types(inputs.dtype, torch.float32))
        for chunk in pairs(inputs, self.samples, self.batch):
            i, b = chunk // len(inputs), chunk % len(inputs)
            drawn = {n: self._drawn(n, inputs) for n in set(i.tolist())}
            alphas, starts, noise = (torch.stack(some) for some in zip(*(drawn[n] for n in i.tolist()), strict=True))
            change = inputs[b] + noise - starts
            gradient = input_gradient(model, starts + alphas.view(-1, 1, 1, 1) * change, targets[b], self.score)
            total.index_add_(0, b, (change * gradient).to(total))
        return total / self.samples

    def _drawn(self, number: int, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α, baseline (C, H, W) and noise (C, H, W) of a sample, drawn on the CPU so that they are the same on every
        device."""
        alpha, which = uniform(self.seed, number, [0, 1])
        generator = torch.Generator().manual_seed(seed_of(self.seed, number))
        start, noise = torch.rand(inputs.shape[1:], generator=generator), torch.zeros(inputs.shape[1:])
        if self.baselines is not None:
            start = torch.full_like(start, self.baselines[int(which * len(self.baselines))])
        if self.noise:
            noise = self.noise * torch.randn(inputs.shape[1:], generator=generator)
        return inputs.new_tensor(alpha), start.to(inputs), noise.to(inputs)
