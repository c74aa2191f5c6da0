"""The form of maps: how sparse and how simple they are. It says nothing about their truth."""

from typing import ClassVar

import torch
from torch import Tensor

from interp_models.metrics.base import METRICS, UnchangedImages
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import min_max

BINS = 100
"""Bins of the histogram of a map's values."""


@METRICS.register("form")
class Form(UnchangedImages):
    """The form of a map m on its grid of n cells, scaled to [0, 1].

    - `gini`: Gini index of the cells, 1 - 2 Σ_k (m_(k) / Σ m) (n - k + 1/2) / n for m_(1) <= ... <= m_(n). 0 for equal
      cells, 1 - 1/n for a single one: sparse maps are higher (Hurley and Rickard 2009; Chalasani et al., ICML 2020).
    - `complexity`: entropy -Σ p log p of the shares p = m / Σ m, in nats. 0 for a single cell, log n for equal ones
      (Bhatt et al., IJCAI 2020).
    - `entropy`: entropy of the histogram of the values with 100 bins, in nats. Low for maps of few levels (Hedström et
      al., eMPRT 2024).

    The directions are those of the literature, where a simple map is better. They say nothing about faithfulness. No
    pass of the model. See `MapMetric` for the arguments.
    """

    family = "form"
    keys = ("gini", "complexity", "entropy")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"gini": True, "complexity": False, "entropy": False}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "gini": "Gini index of the map: 0 if all cells are equal, near 1 if few cells hold all saliency.",
        "complexity": "Entropy of the map's shares: 0 if one cell holds all saliency.",
        "entropy": "Entropy of the histogram of the map's values: 0 if there is one level.",
    }

    def _score(self, case: Case) -> dict[str, Tensor]:
        cells = min_max(case.maps).flatten(1).double()
        n = cells.shape[1]
        shares = cells / cells.sum(dim=1, keepdim=True)
        k = torch.arange(1, n + 1, device=cells.device)
        counts = torch.zeros(len(cells), BINS, device=cells.device, dtype=torch.float64)
        level = (cells * BINS).long().clamp(max=BINS - 1)
        counts.scatter_add_(1, level, torch.ones_like(cells))
        return {
            "gini": 1 - 2 * (shares.sort(dim=1).values * (n - k + 0.5) / n).sum(dim=1),
            "complexity": torch.special.entr(shares).sum(dim=1),
            "entropy": torch.special.entr(counts / n).sum(dim=1),
        }
