"""Global sensitivity analysis of the score as a function of the cells of a mask: Sobol' indices and HSIC."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from interp_models.core.batches import scores_of_variants
from interp_models.core.errors import InputError
from interp_models.core.rng import uniform
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS, ByFields
from interp_models.explainers.segments import check_cells

MOST_DIMENSIONS = torch.quasirandom.SobolEngine.MAXDIM
"""Most numbers per point of torch's Sobol' sequence."""


@dataclass(kw_only=True, eq=False, repr=False)
class _OfMasks(ByFields, ABC):
    """Abstract: one value per cell of a grid, from the scores of images that are multiplied by masks.

    All images share the same masks, which are made a few at a time. The map has the grid's resolution.
    """

    amplifies_rounding = True
    stands_bfloat16 = False

    cells: int = 7
    """Cells along each side."""
    seed: int = 0
    """Seed of the masks."""
    score: Score = "logit"
    """Explain the target's `logit` or its `probability`."""
    batch: int | None = None
    """Masked images per forward pass; None chooses it for the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cells < 1 or (self.batch is not None and self.batch < 1):
            raise InputError(f"cells and batch must be at least 1; got {self.cells}, {self.batch}")

    @torch.no_grad()
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        check_cells(self.cells, inputs)
        score, _, targets = self.scored(inputs, target)
        masks = self._masks()
        grids = torch.as_tensor(masks, dtype=inputs.dtype, device=inputs.device).view(-1, 1, self.cells, self.cells)

        def masked(b: Tensor, i: Tensor) -> Tensor:
            return inputs[b] * F.interpolate(grids[i], size=tuple(inputs.shape[-2:]), mode="nearest")

        scores = scores_of_variants(score, inputs, len(grids), masked, targets, self.batch)
        # The sums need float64, which not every device has: they run on the CPU.
        values = np.stack([self._values(masks, row) for row in scores.cpu().double().numpy()])
        found = torch.as_tensor(values, dtype=torch.float32, device=inputs.device)
        return found.view(-1, self.cells, self.cells)

    @abstractmethod
    def _masks(self) -> NDArray[np.float64]:
        """The masks (n, P) with values in [0, 1]; 0 is black."""

    @abstractmethod
    def _values(self, masks: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """The value of each cell (P,), from the scores of one image (n,)."""


@EXPLAINERS.register("sobol")
@dataclass(kw_only=True, eq=False, repr=False)
class Sobol(_OfMasks):
    """Sobol attribution: total Sobol' indices of the cells, ST_i = Σ_j (f(A_j) - f(C_ij))² / (2 N V) (Fel et al.,
    NeurIPS 2021, with Jansen's estimator).

    f is the score of x ⊙ m, where each of the P = cells² cells of the mask m has one value in [0, 1]. A and B are two
    sets of N masks, together a scrambled Sobol' sequence. C_ij is A_j with cell i of B_j, and V is the variance of f(A)
    with divisor N - 1. ST_i is the share of the variance in which cell i takes part, alone or with others; it is not
    negative, so it does not tell evidence for the class from evidence against it. If no mask changes the score, the map
    is 0.
    """

    passes = "designs * (cells**2 + 1) + 1"
    small: ClassVar[Mapping[str, Any]] = {"designs": 4, "cells": 2}

    designs: int = 32
    """Number N of masks in A, a power of 2 (authors: 32)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2 * self.cells**2 > MOST_DIMENSIONS:
            raise InputError(f"sobol: cells must be at most {math.isqrt(MOST_DIMENSIONS // 2)}; got {self.cells}")
        if self.designs < 2 or self.designs & (self.designs - 1):
            raise InputError(f"sobol: designs must be a power of 2, at least 2; got {self.designs}")

    def _masks(self) -> NDArray[np.float64]:
        count = self.cells**2
        sequence = torch.quasirandom.SobolEngine(2 * count, scramble=True, seed=self.seed)  # type: ignore[no-untyped-call]
        both = sequence.draw(self.designs, dtype=torch.float64).numpy()
        a, b = both[:, :count], both[:, count:]
        c = np.repeat(a[None], count, axis=0)
        cell = np.arange(count)
        c[cell, :, cell] = b.T
        return np.concatenate([a[None], c]).reshape(-1, count)

    def _values(self, masks: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        a, *c = scores.reshape(-1, self.designs)
        variance = a.var(ddof=1)
        if not variance > 0:
            return np.zeros(self.cells**2)
        found: NDArray[np.float64] = np.square(a - np.stack(c)).sum(axis=1) / (2 * self.designs * variance)
        return found


@EXPLAINERS.register("hsic")
@dataclass(kw_only=True, eq=False, repr=False)
class HSIC(_OfMasks):
    """HSIC attribution: the dependence of the score on each cell, HSIC_i = tr(K_i H L H) / n² (Novello et al., NeurIPS
    2022; the published estimator divides by (n - 1)², a constant factor).

    Each cell is visible in half of the n masks, drawn at random (a Latin hypercube). K_i says whether two masks agree
    in cell i (1 or 0), L = exp(-(y - y')² / (2 σ²)) compares their scores, σ is the median of |y - y'| over pairs of
    masks with unequal scores, and H subtracts the means of rows and columns. The map is not negative, so it does not
    tell evidence for the class from evidence against it. If no mask changes the score, the map is 0.
    """

    passes = "samples + 1"
    small: ClassVar[Mapping[str, Any]] = {"samples": 8, "cells": 2}

    samples: int = 500
    """Number n of masks (paper: 1500, or 750; Xplique: 500)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise InputError(f"hsic: samples must be at least 2; got {self.samples}")

    def _masks(self) -> NDArray[np.float64]:
        draws = uniform(self.seed, np.arange(self.samples)[:, None], np.arange(self.cells**2))
        order = draws.argsort(axis=0).argsort(axis=0)  # of each cell, a random order of the masks
        return (order < self.samples // 2).astype(np.float64)

    def _values(self, masks: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        apart = np.abs(scores[:, None] - scores)
        unequal = apart[apart > 0]  # each pair twice
        if not len(unequal):
            return np.zeros(self.cells**2)
        alike = np.exp(-np.square(apart / np.median(unequal)) / 2)
        # K_i is 1 - (m - m')² for values 0 and 1, so that H K_i H = 2 m̃ m̃ᵀ with m̃ = m - mean(m).
        centred = masks - masks.mean(axis=0)
        found: NDArray[np.float64] = 2 * ((centred.T @ alike) * centred.T).sum(axis=1) / len(scores) ** 2
        return found
