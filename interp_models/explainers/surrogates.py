"""Linear models of the score of images whose segments are switched on and off: LIME and KernelSHAP."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.rng import uniform
from interp_models.core.scoring import Score, Target, resolve_target, scores_of_variants
from interp_models.explainers.base import EXPLAINERS, Explainer
from interp_models.explainers.segments import Fill, Segments, means, segmented


class _Surrogate(Explainer, ABC):
    """Abstract: a regression of scores on the segments that are on, which are drawn alike for all images."""

    amplifies_rounding = True
    stands_bfloat16 = False

    def __init__(
        self,
        model: nn.Module,
        *,
        samples: int,
        segments: Segments,
        cells: int,
        fill: Fill,
        seed: int,
        score: Score,
        batch: int | None,
    ) -> None:
        super().__init__(model, score=score)
        if cells < 1 or samples < 1 or (batch is not None and batch < 1):
            raise InputError(f"samples, cells and batch must be at least 1; got {samples}, {cells}, {batch}")
        self.samples, self.segments, self.cells, self.fill = samples, segments, cells, fill
        self.seed, self.batch = seed, batch

    @torch.no_grad()
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        if self.cells > min(inputs.shape[-2:]):
            raise InputError(
                f"{self.cells} cells a side are more than images of {tuple(inputs.shape[-2:])} pixels have"
            )
        score = self.score_fn(inputs)
        targets = resolve_target(target, score(inputs))
        numbers = segmented(inputs, self.cells, self.segments)
        off = torch.zeros_like(inputs)
        if self.fill == "mean":
            index = numbers.flatten(1)
            colours = means(inputs.flatten(2), index, self.cells**2)
            off = colours.gather(2, index[:, None].expand(-1, inputs.shape[1], -1)).view_as(inputs)
        switched = self._switched()
        on = torch.as_tensor(switched, device=inputs.device)  # (n, P) bool

        def sample(b: Tensor, i: Tensor) -> Tensor:
            shown = on[i].gather(1, numbers[b].flatten(1).expand(len(i), -1)).view(-1, 1, *inputs.shape[-2:])
            return torch.where(shown, inputs[b], off[b])

        scores = scores_of_variants(score, inputs, len(on), sample, targets, self.batch)
        # Small, and by float64: not every device has it.
        values = self._fit(switched, scores.cpu().double().numpy())
        weights = torch.as_tensor(values, dtype=torch.float32, device=inputs.device)
        if self.segments == "grid":
            return weights.view(-1, self.cells, self.cells)
        return weights.gather(1, numbers.flatten(1)).view(-1, *inputs.shape[-2:])

    @abstractmethod
    def _switched(self) -> NDArray[np.bool_]:
        """(n, P), the segments that are on in each sample."""

    @abstractmethod
    def _fit(self, on: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of the segments (B, P), of scores (B, n)."""


@EXPLAINERS.register("lime")
class LIME(_Surrogate):
    """w of min Σ_i π(z_i) (y(z_i) - w·z_i - w0)² + λ |w|², with z_i the segments that are on, each by a half chance,
    and π(z) = exp(-D² / σ²), D the cosine distance of z and all segments (Ribeiro et al., KDD 2016, equations 1, 2).

    Ridge regression on all segments, as in the authors' code, in place of the paper's choice of a few by LASSO. All
    images have the same z_i, of which the first has all segments on; the regression is solved for all at once. One pass
    per sample.

    Args:
        model: any module that returns logits.
        samples: number of z_i.
        segments: `superpixels` (by SLIC) as in the paper, or the cells of a `grid`, whose map has its resolution.
        cells: segments along each side.
        fill: what shows where a segment is off, its `mean` colour (the authors' code) or `black`.
        kernel_width: σ.
        ridge: λ.
        seed: of the samples.
        score: what is fitted.
        batch: images per pass; None chooses by the device.
    """

    passes = "samples + 1"
    small: ClassVar[Mapping[str, Any]] = {"samples": 6, "cells": 2}

    def __init__(
        self,
        model: nn.Module,
        *,
        samples: int = 1000,
        segments: Segments = "superpixels",
        cells: int = 7,
        fill: Fill = "mean",
        kernel_width: float = 0.25,
        ridge: float = 1.0,
        seed: int = 0,
        score: Score = "probability",
        batch: int | None = None,
    ) -> None:
        super().__init__(
            model, samples=samples, segments=segments, cells=cells, fill=fill, seed=seed, score=score, batch=batch
        )
        if not (kernel_width > 0 and ridge > 0):
            raise InputError(f"lime needs kernel_width and ridge > 0; got {kernel_width}, {ridge}")
        self.kernel_width, self.ridge = kernel_width, ridge

    def _switched(self) -> NDArray[np.bool_]:
        on = uniform(self.seed, np.arange(self.samples)[:, None], np.arange(self.cells**2)) < 0.5
        on[0] = True
        return on

    def _fit(self, on: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        near = np.sqrt(on.mean(axis=1))  # cosine of z and a vector of ones
        weights = np.exp(-((1 - near) ** 2) / self.kernel_width**2)
        z: NDArray[np.float64] = on - np.average(on, axis=0, weights=weights)  # centred, so that w0 drops out
        y = scores - np.average(scores, axis=1, weights=weights)[:, None]
        normal = z.T @ (weights[:, None] * z) + self.ridge * np.eye(on.shape[1])
        return np.linalg.solve(normal, (weights[:, None] * z).T @ y.T).T


@EXPLAINERS.register("kernelshap")
class KernelSHAP(_Surrogate):
    """Shapley values of the segments: φ of min Σ_z π(z) (v(z) - v(0) - φ·z)² with φ adding up to v(1) - v(0) and
    π(z) = (P - 1) / (C(P, |z|) |z| (P - |z|)) (Lundberg and Lee, NeurIPS 2017, theorem 2).

    All z are taken, so that φ are exact, if they are no more than the samples. Else they are drawn by π, each followed
    by what it lacks (so an odd sample is left out); all images share them, and the regression is solved for all at
    once. One pass per sample.

    Args:
        model: any module that returns logits.
        samples: number of z, beside none and all segments (the authors' code: 2 P + 2048).
        segments: `superpixels` (by SLIC), or the cells of a `grid`, whose map has its resolution.
        cells: segments along each side.
        fill: what shows where a segment is off, its `mean` colour or `black`.
        seed: of the samples.
        score: v.
        batch: images per pass; None chooses by the device.
    """

    passes = "samples + 3"
    small: ClassVar[Mapping[str, Any]] = {"samples": 8, "cells": 2}

    def __init__(
        self,
        model: nn.Module,
        *,
        samples: int = 2048,
        segments: Segments = "superpixels",
        cells: int = 7,
        fill: Fill = "mean",
        seed: int = 0,
        score: Score = "probability",
        batch: int | None = None,
    ) -> None:
        super().__init__(
            model, samples=samples, segments=segments, cells=cells, fill=fill, seed=seed, score=score, batch=batch
        )
        if cells < 2 or samples < 2 * cells**2:
            raise InputError(f"kernelshap needs cells >= 2 and samples >= 2 cells²; got {cells} and {samples}")

    def _switched(self) -> NDArray[np.bool_]:
        count = self.cells**2
        ends = np.repeat([[False], [True]], count, axis=1)
        if count < 31 and 2**count - 2 <= self.samples:
            every = np.arange(1, 2**count - 1)[:, None] >> np.arange(count) & 1 == 1
            return np.concatenate([ends, every])
        sizes = np.arange(1, count)
        cumulative = np.cumsum(1 / (sizes * (count - sizes)))  # of all z of a size together
        draws = uniform(self.seed, np.arange(self.samples // 2)[:, None], np.arange(count + 1))
        size = sizes[np.searchsorted(cumulative / cumulative[-1], draws[:, 0], side="right").clip(max=count - 2)]
        on = draws[:, 1:].argsort(axis=1).argsort(axis=1) < size[:, None]
        return np.concatenate([ends, np.stack([on, ~on], axis=1).reshape(-1, count)])

    def _fit(self, on: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        z, count = on[2:].astype(float), on.shape[1]
        none, change = scores[:, :1], scores[:, 1:2] - scores[:, :1]
        weights = np.ones(len(z))
        if len(z) == 2**count - 2:
            size = z.sum(axis=1)
            choose = np.asarray([math.comb(count, int(n)) for n in size], dtype=float)
            weights = (count - 1) / (choose * size * (count - size))
        # Without the last segment, whose value the sum of all gives.
        last, others = z[:, -1:], z[:, :-1] - z[:, -1:]
        y = (scores[:, 2:] - none).T - last * change.T  # (n, B)
        root = np.sqrt(weights)[:, None]
        found = np.linalg.lstsq(root * others, root * y, rcond=None)[0].T
        return np.concatenate([found, change - found.sum(axis=1, keepdims=True)], axis=1)
