"""Deletion and insertion curves of vision transformers by dropping patches."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from interp_models.core.batches import default_batch
from interp_models.core.inputs import finite
from interp_models.core.scoring import checked, resolve_target
from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import is_constant, to_grid, trapezoid


@METRICS.register("patch_dropping")
class PatchDropping(MapMetric):
    """Deletion and insertion for vision transformers: patches are dropped, and no pixel is changed.

    A convolutional network needs some colour for a removed pixel, and takes the colour as evidence. The blocks of a
    transformer work with fewer tokens, so the score is that of the other patches alone (Jain et al., ICLR 2022). The
    map is brought to the transformer's grid of patches. Patches are dropped until one is left, in as many steps as the
    preset allows.

    - `patch_dauc`: mean score, by the trapezoidal rule, while the most salient patches are dropped first. Lower is
      better.
    - `patch_iauc`: the same while the least salient patches are dropped first, so that the most salient are shown
      longest. Higher is better.

    In [0, 1]. Undefined for an image of a single patch, and for a map whose patches are all equal. T steps take T
    passes per image and curve, with half of the tokens on average. The transformer must be one of timm, and its
    blocks must not depend on the order of the tokens. See `MapMetric` for the arguments.
    """

    needs = ("score_fn", "patch_scores")
    keys = ("patch_dauc", "patch_iauc")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"patch_dauc": False, "patch_iauc": True}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "patch_dauc": "Mean score of a transformer while patches are dropped, the most salient first.",
        "patch_iauc": "Mean score of a transformer while patches are dropped, the least salient first.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        assert case.patch_scores is not None
        maps, score = to_grid(case.maps, case.patch_scores.grid), checked(case.patch_scores)
        values: dict[str, Tensor] = {}
        for key, order in (("patch_dauc", maps), ("patch_iauc", -maps)):
            if self.wants(key):
                with case.watched(key):
                    mean = self._mean(case, score, order, key)
                    values[key] = mean.masked_fill(is_constant(maps).cpu(), torch.nan)
        return values

    def _mean(self, case: Case, score: Callable[..., Tensor], maps: Tensor, key: str) -> Tensor:
        """Mean score (B,), float64 on the CPU, while patches are dropped, those with the largest values of the maps
        (B, h, w) first."""
        patches = maps[0].numel()
        if patches == 1:
            return torch.full((len(maps),), torch.nan, dtype=torch.float64)
        counts = sorted({min(count, patches - 1) for count in self.preset.counts(patches, self.max_steps)})
        order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
        size, scores = self.batch or default_batch(case.images), [case.known_clean]
        for count in counts[1:]:
            parts = zip(torch.split(case.images, size), torch.split(order[:, count:], size), strict=True)
            found = finite(torch.cat([score(images, kept) for images, kept in parts]))
            scores.append(found.gather(1, resolve_target(case.target, found)[:, None])[:, 0].to(scores[0].dtype))
        curve, fractions = torch.stack(scores, dim=1), [count / counts[-1] for count in counts]
        case.keep_curve(key, fractions, curve)
        return trapezoid(curve, fractions)

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The number of steps is that of the transformer's patches, not of the map; nothing fills dropped patches."""
        return None, "dropped"
