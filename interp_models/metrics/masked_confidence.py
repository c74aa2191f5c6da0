"""Change of the score when the map masks the image: AD, IIC, ADD and AG."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case

SATURATED = 1e-6
"""A score closer to 1 than this can only rise by float32 noise."""


@METRICS.register("masked_confidence")
class MaskedConfidence(MapMetric):
    """Masked confidence: the score Y of the image x, compared with the scores O of x ⊙ m and D of x ⊙ (1 - m), where m
    is the map as a mask.

    The map is normalised to [0, 1] and upsampled; the preset says in which order.

    - `ad`, average drop: (Y - O)⁺ / Y, in [0, 1]. Lower is better (Chattopadhay et al. 2018).
    - `iic`, increase in confidence: 1 if O > Y, else 0. Higher is better (same source; tutorial, equation 24).
    - `add`, average drop in deletion: (Y - D)⁺ / Y, in [0, 1]. Higher is better (Jung and Oh 2021).
    - `ag`, average gain: (O - Y)⁺ / (1 - Y), in [0, 1]. Higher is better (Zhang et al. 2023, Opti-CAM).
    - `context_increase`: 1 if D > Y, else 0. Lower is better (Fahim et al. 2022, which calls `ad`, `iic` and
      `add` salience drop, salience increase and context drop).

    `ad` and `add` are undefined for Y = 0, `ag` for Y = 1. An image takes three passes, the clean one
    included, or two if only values of O or only values of D are wanted. See
    `MapMetric` for the arguments.
    """

    keys = ("ad", "iic", "add", "ag", "context_increase")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {
        "ad": False, "iic": True, "add": True, "ag": True, "context_increase": False,
    }  # fmt: skip
    percent = True
    aliases: ClassVar[Mapping[str, str]] = {
        "ai": "iic",  # average increase
        "salience_drop": "ad",
        "salience_increase": "iic",
        "context_drop": "add",
    }
    legend: ClassVar[dict[str, str]] = {
        "ad": "Average drop: the fraction of the class score that is lost when only the salient part is shown.",
        "iic": "Increase in confidence: the fraction of images whose score rises when only the salient part is shown.",
        "add": "Average drop in deletion: the fraction of the score that is lost when the salient part is removed.",
        "ag": "Average gain: the fraction of the missing score that is gained when only the salient part is shown.",
        "context_increase": "The fraction of images whose score rises when the salient part is removed.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        images, maps, clean = case.images, case.maps, case.known_clean
        height, width = images.shape[-2:]
        mask = self.preset.mask(maps, (height, width))[:, None].to(images.dtype)  # float32 would promote half precision
        values: dict[str, Tensor] = {}
        if self.wants("ad", "iic", "ag"):
            with case.watched("ad", "iic", "ag"):
                kept = case.scores(images * mask, self.batch)
            values |= {"ad": drop(clean, kept), "iic": (kept > clean).float(), "ag": gain(clean, kept)}
        if self.wants("add", "context_increase"):
            with case.watched("add", "context_increase"):
                removed = case.scores(images * (1 - mask), self.batch)
            values["add"] = drop(clean, removed, clip=self.preset.clip_add)
            values["context_increase"] = (removed > clean).float()
        return {key: values[key] for key in self.keys if key in values}

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """No steps; masked pixels are black."""
        return None, "black"


def drop(clean: Tensor, score: Tensor, *, clip: bool = True) -> Tensor:
    """The fraction (B,) of the clean score that is lost, (Y - O)⁺ / Y, or (Y - O) / Y without `clip`; NaN for Y = 0."""
    lost = clean - score
    return (lost.relu() if clip else lost) / torch.where(clean > 0, clean, torch.nan)


def gain(clean: Tensor, score: Tensor) -> Tensor:
    """The fraction (B,) of the missing score that is gained, (O - Y)⁺ / (1 - Y); NaN for Y = 1."""
    return torch.where(1 - clean > SATURATED, (score - clean).relu() / (1 - clean), torch.nan)
