"""Confidence under the map as a soft mask: AD, IIC, ADD and AG."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.scoring import ScoreFn
from interp_models.metrics.base import METRICS, FaithfulnessMetric, Grid
from interp_models.metrics.perturbation import score_all

SATURATED = 1e-6
"""A score nearer to 1 than this cannot rise by more than float32 noise."""


@METRICS.register("masked_confidence")
class MaskedConfidence(FaithfulnessMetric):
    """With Y the score of the image x, O that of x ⊙ m and D that of x ⊙ (1 - m), m the map as a mask in [0, 1]:

    - `ad`, average drop, (Y - O)⁺ / Y, in [0, 1], lower is better (Chattopadhay et al. 2018);
    - `iic`, increase in confidence, 1[O > Y], higher is better (ibid.; tutorial equation 24);
    - `add`, average drop in deletion, (Y - D)⁺ / Y, in [0, 1], higher is better (Jung and Oh 2021);
    - `ag`, average gain, (O - Y)⁺ / (1 - Y), in [0, 1], higher is better (Zhang et al. 2023, Opti-CAM).

    `ad` and `add` are undefined for Y = 0, `ag` for Y = 1. Three passes per image, the clean one included.
    """

    keys = ("ad", "iic", "add", "ag")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"ad": False, "iic": True, "add": True, "ag": True}
    percent = True
    aliases: ClassVar[Mapping[str, str]] = {"ai": "iic"}  # average increase
    legend: ClassVar[dict[str, str]] = {
        "ad": "Average drop: the share of the class score that is lost when only the salient part is shown.",
        "iic": "Increase in confidence: the share of images whose score rises when only the salient part is shown.",
        "add": "Average drop in deletion: the share of the class score that is lost when the salient part is removed.",
        "ag": "Average gain: the share of the missing score that is gained when only the salient part is shown.",
    }

    def _score(
        self, score_fn: ScoreFn, images: Tensor, maps: Tensor, target: Tensor, clean: Tensor
    ) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        mask = self.preset.mask(maps, (height, width))[:, None].to(images.dtype)  # keeps half precision
        kept = score_all(score_fn, images * mask, target, self.batch)
        removed = score_all(score_fn, images * (1 - mask), target, self.batch)
        positive = torch.where(clean > 0, clean, torch.nan)
        drop = clean - removed
        return {
            "ad": (clean - kept).relu() / positive,
            "iic": (kept > clean).float(),
            "add": (drop.relu() if self.preset.clip_add else drop) / positive,
            "ag": torch.where(1 - clean > SATURATED, (kept - clean).relu() / (1 - clean), torch.nan),
        }

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """No steps; what is masked is black."""
        return None, "black"
