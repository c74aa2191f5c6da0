"""ROAD: remove and debias, deletion with noisy linear imputation."""

from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.batches import default_batch, scores_of_variants
from interp_models.core.maps import enlarged
from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case
from interp_models.metrics.imputation import impute, normal_noise
from interp_models.metrics.perturbation import exact, ranks

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Fractions of the pixels that are removed."""
NOISE = 0.01
"""Standard deviation of the noise on imputed pixels."""


@METRICS.register("road")
class Road(MapMetric):
    """ROAD (Rong et al., ICML 2022): the target's score while pixels of the upsampled map are removed and imputed.

    Removed pixels become the weighted mean of their neighbours, see `imputation.impute`, plus normal noise with σ =
    0.01. So the shape of the removed region says less about the class than with a fixed colour. 10, 20, ..., 90 % are
    removed.

    - `road_morf`: mean score when the most salient pixels are removed first, in [0, 1]. Lower is better.
    - `road_lerf`: mean score when the least salient pixels are removed first, in [0, 1]. Higher is better.
    - `road`: (`road_lerf` - `road_morf`) / 2, in [-1/2, 1/2]. Higher is better.

    The paper's score is the accuracy of hard labels; that of a single image is its probability here, as in grad-cam. 9
    passes per image for each order. See `MapMetric` for the arguments.
    """

    keys = ("road_morf", "road_lerf", "road")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"road_morf": False, "road_lerf": True, "road": True}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "road_morf": "ROAD: mean score while pixels are removed and imputed, the most salient first.",
        "road_lerf": "ROAD: mean score while pixels are removed and imputed, the least salient first.",
        "road": "ROAD, both orders: half the difference of the mean scores.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        maps = enlarged(case.maps, case.size)
        values: dict[str, Tensor] = {}
        if self.wants("road_morf", "road"):
            with case.watched("road_morf", "road"):
                values["road_morf"] = self._mean(case, ranks(maps), "road_morf")
        if self.wants("road_lerf", "road"):
            with case.watched("road_lerf", "road"):
                values["road_lerf"] = self._mean(case, ranks(-maps), "road_lerf")
        if self.wants("road"):
            values["road"] = (values["road_lerf"] - values["road_morf"]) / 2
        return values

    def _mean(self, case: Case, order: Tensor, key: str) -> Tensor:
        """Mean score (B,) over the fractions, when pixels are removed in an order (B, H, W)."""
        assert case.score_fn is not None
        assert isinstance(case.target, Tensor)
        images, pixels = case.images, order[0].numel()
        counts = torch.tensor([round(fraction * pixels) for fraction in FRACTIONS], device=images.device)
        noise = NOISE * normal_noise(*images.shape[1:]).to(images)

        def imputed(b: Tensor, t: Tensor) -> Tensor:
            known = order[b] >= counts[t][:, None, None]
            source = images[b].expand(len(t), -1, -1, -1)
            filled = impute(source, known)
            return torch.where(known[:, None], source, filled + noise).clamp(0, 1)

        batch = self.batch or default_batch(images)
        scores = scores_of_variants(case.score_fn, images, len(counts), imputed, case.target, batch)
        case.keep_curve(key, FRACTIONS, scores)
        return exact(scores).mean(dim=1)

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """Nine steps; removed pixels are imputed."""
        return len(FRACTIONS), "noisy linear imputation"
