"""Linear surrogate models of the score as a function of the visible segments: LIME and KernelSHAP."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_models.core.batches import scores_of_variants
from interp_models.core.errors import InputError
from interp_models.core.rng import uniform
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS, ByFields
from interp_models.explainers.segments import Fill, Segments, check_cells, means, segmented


@dataclass(kw_only=True, eq=False, repr=False)
class _Surrogate(ByFields, ABC):
    """Abstract: a linear regression of the score on the visible segments. All images share the same samples."""

    amplifies_rounding = True
    stands_bfloat16 = False

    samples: int
    """Number of samples."""
    segments: Segments = "superpixels"
    """`superpixels` (SLIC) or the cells of a `grid`. The map of a grid has its resolution."""
    cells: int = 7
    """Segments along each side; there are P = cells²."""
    fill: Fill = "mean"
    """Colour of hidden segments: their `mean` colour or `black`."""
    seed: int = 0
    """Seed of the samples."""
    score: Score = "logit"
    """Fit the target's `logit` or its `probability`, which also depends on the logits of other classes."""
    batch: int | None = None
    """Images per forward pass; None chooses it for the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cells < 1 or self.samples < 1 or (self.batch is not None and self.batch < 1):
            raise InputError(
                f"samples, cells and batch must be at least 1; got {self.samples}, {self.cells}, {self.batch}"
            )

    @torch.no_grad()
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        check_cells(self.cells, inputs)
        score, _, targets = self.scored(inputs, target)
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
        # The regression is small and needs float64, which not every device has: it runs on the CPU.
        values = self._fit(switched, scores.cpu().double().numpy())
        weights = torch.as_tensor(values, dtype=torch.float32, device=inputs.device)
        if self.segments == "grid":
            return weights.view(-1, self.cells, self.cells)
        return weights.gather(1, numbers.flatten(1)).view(-1, *inputs.shape[-2:])

    @abstractmethod
    def _switched(self) -> NDArray[np.bool_]:
        """The visible segments of each sample, (n, P) bool."""

    @abstractmethod
    def _fit(self, on: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Fit the scores (B, n); return the values of the segments (B, P)."""


@EXPLAINERS.register("lime")
@dataclass(kw_only=True, eq=False, repr=False)
class LIME(_Surrogate):
    """LIME: the weights w that minimise Σ_i π(z_i) (y(z_i) - w·z_i - w0)² + λ |w|² (Ribeiro et al., KDD 2016, equations
    1 and 2).

    z_i says which segments are visible, each with probability 1/2, and y(z_i) is the score of that image. The kernel is
    π(z) = exp(-D² / σ²) with D the cosine distance between z and the image with all segments. As in the authors' code,
    all segments enter the ridge regression; the paper first selects a few by LASSO. All images share the z_i, and all
    segments are visible in the first. Each sample takes one forward pass. Superpixels are those of the paper, and the
    mean colour is that of the authors' code.
    """

    passes = "samples + 1"
    small: ClassVar[Mapping[str, Any]] = {"samples": 6, "cells": 2}

    samples: int = 1000
    """Number of z_i."""
    kernel_width: float = 0.25
    """σ of the kernel."""
    ridge: float = 1.0
    """λ, the weight of the penalty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.kernel_width > 0 and self.ridge > 0):
            raise InputError(f"lime needs kernel_width and ridge > 0; got {self.kernel_width}, {self.ridge}")

    def _switched(self) -> NDArray[np.bool_]:
        on = uniform(self.seed, np.arange(self.samples)[:, None], np.arange(self.cells**2)) < 0.5
        on[0] = True
        return on

    def _fit(self, on: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        near = np.sqrt(on.mean(axis=1))  # cosine similarity of z and a vector of ones
        weights = np.exp(-((1 - near) ** 2) / self.kernel_width**2)
        z: NDArray[np.float64] = on - np.average(on, axis=0, weights=weights)  # centring removes w0
        y = scores - np.average(scores, axis=1, weights=weights)[:, None]
        normal = z.T @ (weights[:, None] * z) + self.ridge * np.eye(on.shape[1])
        return np.linalg.solve(normal, (weights[:, None] * z).T @ y.T).T


@EXPLAINERS.register("kernelshap")
@dataclass(kw_only=True, eq=False, repr=False)
class KernelSHAP(_Surrogate):
    """KernelSHAP: Shapley values φ of the P segments, which minimise Σ_z π(z) (v(z) - v(0) - φ·z)² (Lundberg and Lee,
    NeurIPS 2017, theorem 2).

    z says which segments are visible, and v(z) is the score of that image. The sum of φ is constrained to v(1) - v(0).
    The kernel is π(z) = (P - 1) / (C(P, |z|) |z| (P - |z|)). Pairs of a z and its complement are drawn by leverage
    (Musco and Witter, ICLR 2025, algorithm 1): all different, and as many of each size |z| as there are, up to an equal
    share. The weight of a z is its kernel, divided by the share of the sets of its size that are drawn. If `samples`
    suffice for all z, all are used and φ is exact. If `samples` is odd, the last one is not used. All images share the
    z. Each sample takes one forward pass.
    """

    passes = "samples + 3"
    small: ClassVar[Mapping[str, Any]] = {"samples": 8, "cells": 2}

    samples: int = 2048
    """Number of z, in addition to no segments and all segments (the package shap: 2 P + 2048)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cells < 2 or self.samples < 2 * self.cells**2:
            raise InputError(
                f"kernelshap needs cells >= 2 and samples >= 2 cells²; got {self.cells} and {self.samples}"
            )

    def _switched(self) -> NDArray[np.bool_]:
        count = self.cells**2
        drawn = [_drawn(count, size, pairs, self.seed) for size, pairs in pairs_per_size(count, self.samples // 2)]
        on = np.concatenate(drawn)
        ends = np.repeat([[False], [True]], count, axis=1)
        return np.concatenate([ends, np.stack([on, ~on], axis=1).reshape(-1, count)])

    def _fit(self, on: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        z, count = on[2:].astype(float), on.shape[1]
        none, change = scores[:, :1], scores[:, 1:2] - scores[:, :1]
        size = on[2:].sum(axis=1)
        weights = 1 / (np.bincount(size)[size] * size * (count - size))  # π(z) C(P, |z|) / sets drawn of that size
        # The constraint on the sum gives the last segment's value, so it is eliminated from the regression.
        last, others = z[:, -1:], z[:, :-1] - z[:, -1:]
        y = (scores[:, 2:] - none).T - last * change.T  # (n, B)
        root = np.sqrt(weights)[:, None]
        found = np.linalg.lstsq(root * others, root * y, rcond=None)[0].T
        return np.concatenate([found, change - found.sum(axis=1, keepdims=True)], axis=1)


def pairs_per_size(count: int, pairs: int) -> list[tuple[int, int]]:
    """Share pairs of complements evenly among the sizes 1 ... count - 1 of subsets, as far as there are such sets.

    Returns:
        The smaller size of a pair, and the number of pairs.

    >>> pairs_per_size(5, 8)
    [(1, 4), (2, 4)]
    >>> pairs_per_size(5, 12), pairs_per_size(4, 100)
    ([(1, 5), (2, 7)], [(1, 4), (2, 3)])
    """
    sizes = range(1, count // 2 + 1)
    left = {size: math.comb(count, size) // (2 if 2 * size == count else 1) for size in sizes}
    share = {size: 1 if 2 * size == count else 2 for size in sizes}  # sizes in a pair
    given = dict.fromkeys(sizes, 0)
    for size in sorted(sizes, key=lambda size: left[size] / share[size]):  # those that run out come first
        given[size] = min(left[size], round(pairs * share[size] / sum(share.values())))
        pairs -= given[size]
        del share[size]
    return list(given.items())


def _drawn(count: int, size: int, number: int, seed: int) -> NDArray[np.bool_]:
    """Different subsets of a size, (number, count), none of which is the complement of another."""
    half = 2 * size == count
    if number == math.comb(count, size) // (2 if half else 1):
        members = np.array([one for one in itertools.combinations(range(count), size) if one[0] == 0 or not half])
        every = np.zeros((number, count), dtype=bool)
        np.put_along_axis(every, members, True, axis=1)
        return every
    found, draws = np.zeros((0, count), dtype=bool), 0
    while len(found) < number:
        numbers = np.arange(draws, draws + 2 * number)[:, None]
        on = uniform(seed, size, numbers, np.arange(count)).argsort(axis=1).argsort(axis=1) < size
        found = np.concatenate([found, np.where(on[:, :1], on, ~on) if half else on])
        found = found[np.sort(np.unique(found, axis=0, return_index=True)[1])]
        draws += 2 * number
    return found[:number]
