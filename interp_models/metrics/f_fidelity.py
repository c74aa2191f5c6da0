"""F-Fidelity: removal of a bounded random part of what the map marks."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from interp_models.core.rng import uniform
from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import exact, ranks

SIZES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Sizes of the explanation, as fractions of the cells."""
SAMPLES = 8
"""Random removals of each size."""
RATE, BOUND = 0.5, 0.1
"""α, the rate of removal, and β, the largest fraction of all cells that is removed on average (both of the paper)."""


@METRICS.register("f_fidelity")
class FFidelity(MapMetric):
    """F-Fidelity (Zheng et al., ICLR 2025): the drop of the score when a bounded random part of the cells is removed.

    The explanation of size s are the s most salient cells of n. Each of its cells is removed with the rate
    min(α, β n / s), α = 0.5 and β = 0.1, so that on average at most 10 % of the image are removed.

    - `ffid_plus`: mean of f(x) - f(x without these cells). Higher is better.
    - `ffid_minus`: the same for cells outside the explanation, with the rate min(α, β n / (n - s)). Lower is better.

    Both are means over sizes of 10, 30, 50, 70 and 90 % and 8 removals each, in [-1, 1]. The paper's f is a model that
    was trained further on images without random cells (up to β); train such a model for scores like theirs. 40 passes
    per image for each value. See `MapMetric` for the arguments.
    """

    keys = ("ffid_plus", "ffid_minus")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"ffid_plus": True, "ffid_minus": False}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "ffid_plus": "F-Fidelity: the drop of the score when a random tenth is removed from the salient cells.",
        "ffid_minus": "F-Fidelity: the drop of the score when a random tenth is removed from the other cells.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        order = ranks(case.maps)  # (B, h, w)
        n = order[0].numel()
        draws = uniform(np.arange(len(SIZES))[:, None, None], np.arange(SAMPLES)[:, None], np.arange(n))
        chances = torch.as_tensor(draws, device=order.device).view(-1, *order.shape[1:])  # (sizes · samples, h, w)
        sizes = torch.tensor([min(max(1, round(size * n)), max(1, n - 1)) for size in SIZES], device=order.device)
        size = sizes.repeat_interleave(SAMPLES).view(-1, 1, 1)
        inside = order[:, None] < size
        fill = self.preset.removed(case.images)
        values: dict[str, Tensor] = {}
        for key, part, cells in (("ffid_plus", inside, size), ("ffid_minus", ~inside, n - size)):
            if self.wants(key):
                removed = part & (chances < (BOUND * n / cells).clamp(max=RATE))
                with case.watched(key):
                    drops = case.known_clean[:, None] - case.without(fill, removed, self.batch)
                values[key] = exact(drops).mean(dim=1)
        return values

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The number of removals; the preset's fill."""
        return len(SIZES) * SAMPLES, self.preset.fill_name
