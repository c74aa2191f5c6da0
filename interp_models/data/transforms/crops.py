"""Crops of samples; boxes, masks and key points move along."""

from math import ceil

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from interp_models.core.errors import InputError
from interp_models.data.base import Sample


def crop_to_box(sample: Sample) -> Sample:
    """Crop a sample to its box, but at least to one pixel.

    Raises:
        InputError: if the sample has no box.
    """
    if sample.box is None or not len(sample.box):
        raise InputError("data.crop_to_box=true needs a data set with boxes; this one has none")
    height, width = sample.image.shape[-2:]
    left, top, right, bottom = around(sample.box)
    x, y = min(max(int(left), 0), width - 1), min(max(int(top), 0), height - 1)
    return cropped(sample, x, y, max(min(ceil(right), width), x + 1), max(min(ceil(bottom), height), y + 1))


def around(boxes: Tensor) -> tuple[float, float, float, float]:
    """The edges of the smallest box around some boxes (M, 4)."""
    edges = [*boxes.amin(dim=0)[:2].tolist(), *boxes.amax(dim=0)[2:].tolist()]
    return edges[0], edges[1], edges[2], edges[3]


def cropped(sample: Sample, left: int, top: int, right: int, bottom: int) -> Sample:
    """Crop a sample to the part between these edges in pixels."""

    def crop(value: Tensor | None) -> Tensor | None:
        return None if value is None else F.crop(value, top, left, bottom - top, right - left)

    image = F.crop(sample.image, top, left, bottom - top, right - left)
    part = sample._replace(image=image, box=crop(sample.box), masks=crop(sample.masks), parts=crop(sample.parts))
    return hide_outside(part)


def hide_outside(sample: Sample) -> Sample:
    """Mark key points outside the image as not visible."""
    if sample.parts is None or sample.visible is None:
        return sample
    height, width = sample.image.shape[-2:]
    x, y = torch.unbind(sample.parts.as_subclass(Tensor), -1)
    # torchvision flips points to width - 1 - x, so pixel centres are integers and the image ends half a pixel further.
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    return sample._replace(visible=sample.visible & inside)
