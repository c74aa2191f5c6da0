"""RISE: random masks, averaged with the score of the masked image as weight."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.batches import default_batch
from interp_models.core.errors import InputError
from interp_models.core.rng import uniform
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS, Explainer


@EXPLAINERS.register("rise")
class RISE(Explainer):
    """RISE: S(p) = 1 / (N · p1) Σ_i f_c(x ⊙ M_i) M_i(p) at pixel p (Petsiuk et al., BMVC 2018, equation 6 and section
    3.2).

    f_c is the score of class c. Mask M_i is an s × s grid of ones (with probability p1) and zeros, upsampled bilinearly
    to (s+1) cells of ceil(H/s) × ceil(W/s) pixels, and cropped to H × W at a random shift within one cell. It depends
    on the seed and i only, so the result does not depend on the batch. Masks are made a few at a time, so memory does
    not grow with their number. The map has the resolution of the input.

    Args:
        model: any module that returns logits.
        masks: number of masks N (paper: 4000 for VGG16, 8000 for ResNet-50).
        cells: side s of the grid.
        p1: probability that a cell is kept.
        upsampling: `bilinear` with random shifts, as above. `nearest` has cells with hard borders and no shifts (with
            cells=14: the masks of BenchmarkReliability, the code of Gomez et al. 2023).
        seed: seed of the masks.
        score: `probability` as in the paper, or `logit`.
        batch: masked images per forward pass; None chooses it for the device.
    """

    passes = "masks + 1"
    small: ClassVar[Mapping[str, Any]] = {"masks": 12, "batch": 5}

    def __init__(
        self,
        model: nn.Module,
        *,
        masks: int = 8000,
        cells: int = 7,
        p1: float = 0.5,
        upsampling: Literal["bilinear", "nearest"] = "bilinear",
        seed: int = 0,
        score: Score = "probability",
        batch: int | None = None,
    ) -> None:
        super().__init__(model, score=score)
        if masks < 1 or cells < 1 or not 0 < p1 < 1 or (batch is not None and batch < 1):
            raise InputError(f"rise needs masks, cells, batch >= 1 and 0 < p1 < 1; got {masks}, {cells}, {batch}, {p1}")
        self.masks, self.cells, self.p1, self.seed, self.batch = masks, cells, p1, seed, batch
        self.upsampling = upsampling

    @torch.no_grad()
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        score, _, targets = self.scored(inputs, target)
        batch = self.batch or default_batch(inputs)
        wide = torch.promote_types(inputs.dtype, torch.float32)
        total = torch.zeros(len(inputs), *inputs.shape[-2:], device=inputs.device, dtype=wide)
        for masks in self._masks(inputs, batch):
            flat = masks.flatten(1).to(wide)
            for image, c, sum_ in zip(inputs, targets, total, strict=True):
                scores = score(image * masks[:, None].to(image.dtype)).gather(1, c.expand(len(masks), 1))  # (m, 1)
                with torch.autocast(inputs.device.type, enabled=False):  # the sum has thousands of terms
                    sum_ += (scores.T.to(wide) @ flat).view_as(sum_)
        return total / (self.masks * self.p1)

    def _masks(self, inputs: Tensor, chunk: int) -> Iterator[Tensor]:
        """The masks in order, (m, H, W) float32 with m <= chunk."""
        height, width = inputs.shape[-2:]
        cell = (math.ceil(height / self.cells), math.ceil(width / self.cells))
        size = ((self.cells + 1) * cell[0], (self.cells + 1) * cell[1])
        for first in range(0, self.masks, chunk):
            numbers = np.arange(first, min(first + chunk, self.masks))[:, None]
            draws = uniform(self.seed, numbers, np.arange(self.cells**2 + 2))  # the grid, then two shifts
            grids = torch.as_tensor(draws[:, :-2] < self.p1, dtype=torch.float32, device=inputs.device)
            grids = grids.view(-1, 1, self.cells, self.cells)
            if self.upsampling == "nearest":
                y, x = (torch.arange(n, device=inputs.device) * self.cells // n for n in (height, width))
                yield grids[:, 0, y][:, :, x]
                continue
            shifts = (draws[:, -2:] * cell).astype(int)
            large = F.interpolate(grids, size=size, mode="bilinear", align_corners=False)[:, 0]
            yield torch.stack([m[y : y + height, x : x + width] for m, (y, x) in zip(large, shifts, strict=True)])
