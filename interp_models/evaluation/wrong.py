"""Maps of the true class for images whose prediction is wrong, which the page shows beside those of the prediction."""

from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from interp_models.core.errors import NotApplicable
from interp_models.data.base import Sample
from interp_models.explainers.base import Explainer
from interp_models.metrics.perturbation import to_grid

SHOWN = 56
"""Most rows and columns of a map that is only shown."""


class Wrong(NamedTuple):
    """The images of a batch whose prediction is wrong."""

    rows: Tensor
    """Their rows in the batch (k,)."""
    images: Tensor
    """(k, 3, H, W)."""
    label: Tensor
    """Their true classes (k,)."""


def wrong_predictions(given: Sample, prediction: Tensor) -> Wrong | None:
    """The images of a batch whose prediction is wrong; None if there is none, or if images have several labels.

    Args:
        given: images and labels; the label -1 is unknown.
        prediction: the predicted class of each image (B,).
    """
    if given.label.dim() > 1:
        return None
    rows = ((given.label >= 0) & (given.label != prediction)).nonzero()[:, 0]
    return Wrong(rows, given.image[rows], given.label[rows]) if len(rows) else None


def maps_of_label(explainer: Explainer, wrong: Wrong, maps: Tensor) -> Tensor:
    """Maps of the true class for the images whose prediction is wrong, NaN for the others; float16 (B, h, w).

    Fine maps are averaged to at most `SHOWN` cells per side, and each map is divided by its largest absolute value,
    because float16 ends at 65504. If the explainer cannot explain these images, all are NaN.

    Args:
        explainer: the explainer.
        wrong: the images.
        maps: its maps of the predictions (B, H, W).
    """
    grid = (min(maps.shape[-2], SHOWN), min(maps.shape[-1], SHOWN))
    found = torch.full((len(maps), *grid), torch.nan, dtype=torch.float16)
    with suppress(NotApplicable):
        own = to_grid(explainer.attribute(wrong.images, wrong.label), grid)
        size = own.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
        found[wrong.rows.cpu()] = (own / size).to(found)
    return found
