"""Max-sensitivity: how much the map changes when the image changes a little."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from interp_models.core.rng import uniform
from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import check_maps, min_max, to_grid
from interp_models.metrics.regions import share_of

RADIUS, SAMPLES = 0.02, 10
"""Largest change of a pixel, and number of changed images."""


@METRICS.register("max_sensitivity")
class MaxSensitivity(MapMetric):
    """`max_sensitivity`: max_j ‖φ(x + δ_j) - φ(x)‖ / ‖φ(x)‖ over 10 random changes δ_j (Yeh et al., NeurIPS 2019).

    φ is the map on its grid, scaled to [0, 1]. δ_j is uniform in ±0.02 for every pixel; pixels stay in [0, 1]. At least
    0; lower is better. It says that a map is stable, not that it is true: a map that ignores the image has 0. It takes
    10 maps of the explainer per image. See `MapMetric` for the arguments.
    """

    needs = ("explain",)
    keys = ("max_sensitivity",)
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"max_sensitivity": False}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "max_sensitivity": "The largest relative change of the map when all pixels change by up to 2 %."
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        assert case.explain is not None
        own = min_max(case.maps).flatten(1)
        grid, shape = (case.maps.shape[-2], case.maps.shape[-1]), case.images.shape[1:]
        largest = torch.zeros(len(own), device=own.device)
        for sample in range(SAMPLES):
            noise = torch.as_tensor(2 * uniform(sample, np.arange(shape.numel())) - 1).view(shape) * RADIUS
            maps = case.explain((case.images + noise.to(case.images)).clamp(0, 1))
            check_maps(case.images, maps)
            other = min_max(to_grid(maps.to(own), grid)).flatten(1)
            largest = torch.maximum(largest, share_of((other - own).norm(dim=1), own.norm(dim=1)))
        return {"max_sensitivity": largest}

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """Ten samples; every pixel changes a little."""
        return SAMPLES, "uniform noise ±0.02"
