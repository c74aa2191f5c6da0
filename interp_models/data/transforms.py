"""The papers' train and test transforms, on images and ground truth together."""

from math import ceil
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from interp_models.core.errors import InputError
from interp_models.core.inputs import ROUNDING, pixel_range
from interp_models.data.base import Sample
from interp_models.data.decoding import turned

CROP_RATIO = 0.875
"""Side of the crop ÷ side of the resized image: 256 for 224, 512 for 448."""


Name = Literal["wsdan", "resized_crop", "protopnet", "prototree", "prototree_cars"]
"""Whose transforms; `resized_crop` is the usual kind of vision transformers."""
CROPPED = ("wsdan", "resized_crop")
"""Tested on the middle of the image."""


def train_transform(size: int, name: Name = "wsdan") -> v2.Transform:
    """What training images go through; every one draws anew.

    `wsdan`, as BR-NPA: squash to size / 0.875, random crop of `size`, flip, jitter of brightness 0.126 and saturation
    0.5. `resized_crop`: the same with a crop of 40 to 100 % of the area, of sides 3 : 4 to 4 : 3, stretched to `size`.
    `protopnet`: squash to `size`; rotation by up to 15 degrees, or a perspective, or shear by up to 10 degrees;
    flip. `prototree`: squash to `size`; perspective, jitter, flip, rotation and shear in random order, after
    `random_corner`. `prototree_cars`: the same, stronger, and a random crop.
    """
    flip, bilinear = v2.RandomHorizontalFlip(), v2.InterpolationMode.BILINEAR
    steps: list[v2.Transform]
    if name in CROPPED:
        if name == "wsdan":
            steps = [v2.Resize(_squashed(size), antialias=True), v2.RandomCrop(size)]
        else:
            steps = [v2.RandomResizedCrop(size, scale=(0.4, 1.0), antialias=True)]
        steps += [flip, v2.ColorJitter(brightness=0.126, saturation=0.5)]
    elif name == "protopnet":
        rotate = v2.RandomRotation(15, interpolation=bilinear)
        skew = v2.RandomPerspective(0.2, p=1.0)
        shear = v2.RandomAffine(0, shear=(-10, 10, -10, 10), interpolation=bilinear)
        steps = [v2.Resize([size, size], antialias=True), v2.RandomChoice([rotate, skew, shear]), flip]
    else:
        cars = name == "prototree_cars"
        margin = 32 if cars else 0
        shift = None if cars else (0.05, 0.05)
        in_any_order = v2.RandomOrder(
            [
                v2.RandomPerspective(0.5 if cars else 0.2, p=0.5),
                v2.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), 0.4 if cars else 0.02),
                flip,
                v2.RandomAffine(15 if cars else 10, shift, shear=(-2, 2), interpolation=bilinear),
            ]
        )
        steps = [v2.Resize([size + margin, size + margin], antialias=True), in_any_order, v2.RandomCrop(size)]
    return v2.Compose([*steps, *_to_float()])


def plain_transform(size: int, name: Name = "wsdan") -> v2.Transform:
    """What all other images go through: squash to size / 0.875 and crop the centre (`wsdan`, `resized_crop`), or squash
    to `size`."""
    if name in CROPPED:
        return v2.Compose([v2.Resize(_squashed(size), antialias=True), v2.CenterCrop(size), *_to_float()])
    return v2.Compose([v2.Resize([size, size], antialias=True), *_to_float()])


def of_known_range(image: Any) -> Any:
    """The same image, a PIL image turned upright by its EXIF tag; `InputError` unless it is known which of its values
    are black and white: a PIL image of 8 bits, or an array or a tensor of uint8 or of floats in [0, 1]."""
    found, known = type(image).__name__, False
    if isinstance(image, Image.Image):
        found, known = f"a PIL image of mode {image.mode}", not image.mode.startswith(("I", "F"))
        image = turned(image, image)
    elif isinstance(image, Tensor | np.ndarray):
        image = image if isinstance(image, Tensor) or image.flags.writeable else image.copy()  # else torch warns
        values = torch.as_tensor(image)
        found, known = str(values.dtype), values.dtype == torch.uint8
        if values.is_floating_point() and values.numel():
            low, high = pixel_range(values, "pixels")
            found, known = f"floats from {low:.3g} to {high:.3g}", low >= -ROUNDING and high <= 1 + ROUNDING
    if not known:
        raise InputError(
            f"expected a PIL image of 8 bits, or uint8 or floats in [0, 1]; got {found}; "
            "interp_models.open_image(path) reads a file"
        )
    return image


def random_corner(sample: Sample) -> Sample:
    """ProtoTree's crops: the whole image, or what lies between one of its corners and the far ends of the box.

    The box is a tenth larger than given. One of the five is drawn by torch's generator.
    """
    if sample.box is None:
        raise InputError("data.transforms=prototree needs a data set with boxes; prototree_cars does without")
    height, width = sample.image.shape[-2:]
    x0, y0, x1, y1 = (float(edge) for edge in sample.box[0])
    dx, dy = int(0.1 * (x1 - x0)), int(0.1 * (y1 - y0))
    corner = int(torch.randint(5, ()))
    if corner == 4:
        return sample
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    if corner in (0, 2):  # from the left edge to the box's right one
        right = min(x1 + dx, right)
    else:
        left = max(x0 - dx, left)
    if corner in (0, 1):
        bottom = min(y1 + dy, bottom)
    else:
        top = max(y0 - dy, top)
    return cropped(sample, int(left), int(top), int(right), int(bottom))


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
    return cropped(sample, x, y, max(min(ceil(right), width), x + 1), max(min(ceil(bottom), height), y + 1))


def cropped(sample: Sample, left: int, top: int, right: int, bottom: int) -> Sample:
    """The part of the image between these edges in pixels, ground truth moved along."""

    def crop(value: Tensor | None) -> Tensor | None:
        return None if value is None else F.crop(value, top, left, bottom - top, right - left)

    image = F.crop(sample.image, top, left, bottom - top, right - left)
    part = sample._replace(image=image, box=crop(sample.box), masks=crop(sample.masks), parts=crop(sample.parts))
    return hide_outside(part)


def hide_outside(sample: Sample) -> Sample:
    """Mark parts that lie outside the image as not visible."""
    if sample.parts is None or sample.visible is None:
        return sample
    height, width = sample.image.shape[-2:]
    x, y = torch.unbind(sample.parts.as_subclass(Tensor), -1)
    # torchvision flips points to width - 1 - x, so the borders are those of pixels whose centres are whole numbers.
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    return sample._replace(visible=sample.visible & inside)
