"""Masked confidence of parts of the map: its salient zone after a threshold, and its part inside the object's box."""

from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.truth import in_boxes
from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case
from interp_models.metrics.masked_confidence import drop, gain
from interp_models.metrics.regions import soft_masks

THRESHOLD = 0.5
"""Pixels of the map, scaled to [0, 1], above this are the salient zone."""


@METRICS.register("hard_zones")
class HardZones(MapMetric):
    """Masked confidence with a binary mask: the score Y of the image, O of its salient zone alone, D of the rest.

    The salient zone is where the map, upsampled to the image and scaled to [0, 1], is above 0.5.

    - `salience_drop_hard`: (Y - O)⁺ / Y; lower is better.
    - `salience_increase_hard`: 1 if O > Y, else 0; higher is better.
    - `context_drop_hard`: (Y - D)⁺ / Y; higher is better.
    - `context_increase_hard`: 1 if D > Y, else 0; lower is better.

    These are the four columns of Fahim et al. 2022, which does not state whether zones have a threshold. With the map
    as a soft mask they are `ad`, `iic`, `add` and `context_increase`. Drops are undefined for Y = 0. Three passes per
    image, the clean one included. See `MapMetric` for the arguments.
    """

    keys = ("salience_drop_hard", "salience_increase_hard", "context_drop_hard", "context_increase_hard")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {
        "salience_drop_hard": False, "salience_increase_hard": True, "context_drop_hard": True,
        "context_increase_hard": False,
    }  # fmt: skip
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "salience_drop_hard": "The fraction of the score that is lost when only the salient zone is shown.",
        "salience_increase_hard": "The fraction of images whose score rises when only the salient zone is shown.",
        "context_drop_hard": "The fraction of the score that is lost when the salient zone is removed.",
        "context_increase_hard": "The fraction of images whose score rises when the salient zone is removed.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        clean, zone = case.known_clean, (soft_masks(case) > THRESHOLD)[:, None]
        fill = self.preset.removed(case.images)
        values: dict[str, Tensor] = {}
        for zone_name, start, end in (("salience", fill, case.images), ("context", case.images, fill)):
            own = (f"{zone_name}_drop_hard", f"{zone_name}_increase_hard")
            if self.wants(*own):
                with case.watched(*own):
                    score = case.scores(torch.where(zone, end, start), self.batch)
                values |= dict(zip(own, (drop(clean, score), (score > clean).float()), strict=True))
        return values

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """No steps; the preset's fill."""
        return None, self.preset.fill_name


@METRICS.register("box_split")
class BoxSplit(MapMetric):
    """Masked confidence of the map inside and outside the object's boxes (Opti-CAM's table of S, B ∩ S and S ∖ B).

    The map is a mask m as for `ad`, and b is the union of the boxes. O is the score of x ⊙ m ⊙ b or x ⊙ m ⊙ (1 - b).

    - `ad_box`, `ag_box`, `ai_box`: average drop, gain and increase with m ⊙ b.
    - `ad_outside`, `ag_outside`, `ai_outside`: the same with m ⊙ (1 - b).

    Directions are those of `ad`, `ag` and `ai`: a lower drop, a higher gain and increase. A model that looks at the
    background has a low `ad_outside`. Undefined for an image without a box, and where `ad` and `ag` are. Three passes
    per image, the clean one included. See `MapMetric` for the arguments.
    """

    needs = ("score_fn", "boxes")
    keys = ("ad_box", "ag_box", "ai_box", "ad_outside", "ag_outside", "ai_outside")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {
        "ad_box": False, "ag_box": True, "ai_box": True, "ad_outside": False, "ag_outside": True, "ai_outside": True,
    }  # fmt: skip
    percent = True
    legend: ClassVar[dict[str, str]] = {
        "ad_box": "Average drop when only the salient part inside the object's box is shown.",
        "ag_box": "Average gain when only the salient part inside the object's box is shown.",
        "ai_box": "Average increase when only the salient part inside the object's box is shown.",
        "ad_outside": "Average drop when only the salient part outside the object's box is shown.",
        "ag_outside": "Average gain when only the salient part outside the object's box is shown.",
        "ai_outside": "Average increase when only the salient part outside the object's box is shown.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        assert case.truth.boxes is not None
        size = case.size
        inside = in_boxes(case.truth.boxes, size).any(dim=1)
        mask = self.preset.mask(case.maps, size)[:, None].to(case.images.dtype)
        clean, known = case.known_clean, inside.any(dim=(1, 2))
        values: dict[str, Tensor] = {}
        for where, part in (("box", inside), ("outside", ~inside)):
            own = [key for key in self.keys if key.endswith(where)]
            if not self.wants(*own):
                continue
            with case.watched(*own):
                score = case.scores(case.images * mask * part[:, None], self.batch)
            found = {"ad": drop(clean, score), "ag": gain(clean, score), "ai": (score > clean).float()}
            values |= {f"{key}_{where}": value.where(known, torch.nan) for key, value in found.items()}
        return values

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """No steps; masked pixels are black."""
        return None, "black"
