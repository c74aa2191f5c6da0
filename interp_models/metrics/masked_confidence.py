"""Change of the score when the map masks the image: AD, IIC, ADD and AG."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.scoring import ScoreFn
from interp_models.metrics.base import METRICS, FaithfulnessMetric, Grid
from interp_models.metrics.perturbation import score_all

SATURATED = 1e-6
"""A score closer to 1 than this can only rise by float32 noise."""


@METRICS.register("masked_confidence")
class MaskedConfidence(FaithfulnessMetric):
    """Masked confidence: the score Y of the image x, compared with the scores O of x ⊙ m and D of x ⊙ (1 - m), where m
    is the map as a mask.

    The map is normalised to [0, 1] and upsampled; the preset says in which order.

    - `ad`, average drop: (Y - O)⁺ / Y, in [0, 1]. Lower is better (Chattopadhay et al. 2018).
    - `iic`, increase in confidence: 1 if O > Y, else 0. Higher is better (same source; tutorial, equation 24).
    - `add`, average drop in deletion: (Y - D)⁺ / Y, in [0, 1]. Higher is better (Jung and Oh 2021).
    - `ag`, average gain: (O - Y)⁺ / (1 - Y), in [0, 1]. Higher is better (Zhang et al. 2023, Opti-CAM).

    `ad` and `add` are undefined for Y = 0, `ag` for Y = 1. An image takes three passes, the clean one included. See
    `FaithfulnessMetric` for the arguments.
    """

    keys = ("ad", "iic", "add", "ag")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"ad": False, "iic": True, "add": True, "ag": True}
    percent = True
    aliases: ClassVar[Mapping[str, str]] = {"ai": "iic"}  # average increase
    legend: ClassVar[dict[str, str]] = {
        "ad": "Average drop: the fraction of the class score that is lost when only the salient part is shown.",
        "iic": "Increase in confidence: the fraction of images whose score rises when only the salient part is shown.",
        "add": "Average drop in deletion: the fraction of the score that is lost when the salient part is removed.",
        "ag": "Average gain: the fraction of the missing score that is gained when only the salient part is shown.",
    }

    def _score(
        self, score_fn: ScoreFn, images: Tensor, maps: Tensor, target: Tensor, clean: Tensor
    ) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        mask = self.preset.mask(maps, (height, width))[:, None].to(images.dtype)  # float32 would promote half precision
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
        """No steps; masked pixels are black."""
        return None, "black"
