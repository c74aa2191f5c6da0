"""Maps of the true class for images whose prediction is wrong, which the page shows beside those of the prediction."""

from collections.abc import Container
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
SAME = 1e-5
"""Maps that differ by at most so much of the largest value are the same."""


class Wrong(NamedTuple):
    """The images of a batch whose prediction is wrong."""

    rows: Tensor
    """Their rows in the batch (k,)."""
    images: Tensor
    """(k, 3, H, W)."""
    label: Tensor
    """Their true classes (k,)."""


def wrong_predictions(given: Sample, prediction: Tensor, classes: int, shown: Container[int]) -> Wrong | None:
    """The images of a batch that the page shows and whose prediction is wrong; None if there is none, or if images have
    several labels.

    Args:
        given: images and labels; the label -1 is unknown, and labels can go beyond the model's classes.
        prediction: the predicted class of each image (B,).
        classes: number of the model's classes.
        shown: indices of the images that the page shows.
    """
    if given.label.dim() > 1:
        return None
    wrong = (given.label >= 0) & (given.label < classes) & (given.label != prediction)
    is_shown = torch.tensor([index in shown for index in given.index.tolist()], device=wrong.device)
    rows = (wrong & is_shown).nonzero()[:, 0]
    return Wrong(rows, given.image[rows], given.label[rows]) if len(rows) else None


def maps_of_label(explainer: Explainer, wrong: Wrong, maps: Tensor) -> Tensor:
    """Maps of the true class for the images whose prediction is wrong, NaN for the others; float16 (B, h, w).

    Fine maps are averaged to at most `SHOWN` cells per side, and each map is divided by its largest absolute value,
    because float16 ends at 65504. A map that is that of the prediction is left out, as those of a model whose own maps
    do not depend on the class. If the explainer cannot explain these images, all are NaN.

    Args:
        explainer: the explainer.
        wrong: the images.
        maps: its maps of the predictions (B, H, W).
    """
    grid = (min(maps.shape[-2], SHOWN), min(maps.shape[-1], SHOWN))
    found = torch.full((len(maps), *grid), torch.nan, dtype=torch.float16)
    with suppress(NotApplicable):
        own = to_grid(explainer.attribute(wrong.images, wrong.label), grid)
        away = (own - to_grid(maps[wrong.rows].to(own), grid)).abs().amax(dim=(1, 2))
        size = own.abs().amax(dim=(1, 2)).clamp(min=1e-30)
        other = away > SAME * size
        found[wrong.rows[other].cpu()] = (own / size[:, None, None])[other].to(found)
    return found
