"""The papers' train and test transforms, on images and ground truth together."""

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from interp_models.data.base import Sample
from interp_models.errors import InputError

CROP_RATIO = 0.875
"""Side of the crop ÷ side of the resized image: 256 for 224, 512 for 448."""


def train_transform(size: int) -> v2.Transform:
    """Squash to size / 0.875, random crop of `size`, horizontal flip, jitter of brightness 0.126 and saturation 0.5.

    As in WS-DAN (512 and 448) and BR-NPA (size / 0.875 and size).
    """
    return v2.Compose(
        [
            v2.Resize(_squashed(size), antialias=True),
            v2.RandomCrop(size),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.126, saturation=0.5),
            *_to_float(),
        ]
    )


def test_transform(size: int) -> v2.Transform:
    """Squash to size / 0.875, crop the centre `size`, as in WS-DAN and BR-NPA."""
    return v2.Compose([v2.Resize(_squashed(size), antialias=True), v2.CenterCrop(size), *_to_float()])


def _squashed(size: int) -> list[int]:
    side = round(size / CROP_RATIO)
    return [side, side]


def _to_float() -> list[v2.Transform]:
    return [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]


def crop_to_box(sample: Sample) -> Sample:
    """The part of the image inside its box, at least one pixel, ground truth moved along.

    Raises:
        InputError: if the sample has no box.
    """
    if sample.box is None:
        raise InputError("data.crop_to_box=true needs a data set with boxes; this one has none")
    height, width = sample.image.shape[-2:]
    left, top, right, bottom = (float(edge) for edge in sample.box[0])
    x, y = min(max(int(left), 0), width - 1), min(max(int(top), 0), height - 1)
    w, h = max(min(int(right + 1), width) - x, 1), max(min(int(bottom + 1), height) - y, 1)

    def crop(value: Tensor | None) -> Tensor | None:
        return None if value is None else F.crop(value, y, x, h, w)

    cropped = sample._replace(
        image=F.crop(sample.image, y, x, h, w), box=crop(sample.box), masks=crop(sample.masks), parts=crop(sample.parts)
    )
    return hide_outside(cropped)


def hide_outside(sample: Sample) -> Sample:
    """Mark parts that lie outside the image as not visible."""
    if sample.parts is None or sample.visible is None:
        return sample
    height, width = sample.image.shape[-2:]
    x, y = torch.unbind(sample.parts.as_subclass(Tensor), -1)
    # torchvision flips points to width - 1 - x, so the borders are those of pixels whose centres are whole numbers.
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    return sample._replace(visible=sample.visible & inside)
