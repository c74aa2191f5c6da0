"""Base class of transforms: each has one for training images and one for all other images."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from interp_models.core.errors import InputError
from interp_models.core.inputs import ROUNDING, pixel_range
from interp_models.core.registry import Registry, named
from interp_models.data.decoding import turned

CROP_RATIO = 0.875
"""Side of the crop ÷ side of the resized image: 224 / 256, 448 / 512."""


class ImageTransform(ABC):
    """Brings images of any size to one size, as float32 in [0, 1].

    It has two transforms, `augmented` and `evaluation`. Both take an image, or a `Sample` whose boxes, masks and key
    points move along. Random numbers must come from torch's default generator; the data module seeds it for every image
    and epoch.

    Args:
        size: side of the output images in pixels.
    """

    crops_training_images: ClassVar[bool] = False
    """Whether `augmented` crops training images by their box. Then the data set needs boxes, and training images
    without augmentation are cropped to their box, unlike validation images."""

    def __init__(self, size: int) -> None:
        self.size = size

    @abstractmethod
    def augmented(self) -> v2.Transform:
        """The random transform of training images."""

    @abstractmethod
    def evaluation(self) -> v2.Transform:
        """The transform of all other images; it is not random."""


TRANSFORMS: Registry[ImageTransform] = Registry("transform", "interp_models.data.transforms.TRANSFORMS")


def transform_options(node: Any, where: str = "data.transforms") -> dict[str, Any]:
    """Check the transform of a config.

    Args:
        node: a name, or a mapping with `name` and options.
        where: the key in the config, for messages.

    Returns:
        The name and all options, with defaults.

    Raises:
        InputError: for an unknown name or option, or a wrong type.
    """
    if not isinstance(node, str | Mapping):
        raise InputError(f"{where}: expected a name, or a mapping with 'name' and options; got {node!r}")
    name, options = named({"name": node} if isinstance(node, str) else node, where, TRANSFORMS)
    return {"name": name, **TRANSFORMS.options(name, options, given=("size",))}


def transform_of(node: Any, size: int) -> ImageTransform:
    """Build the transform of a config for images with a side of `size` pixels; raises as `transform_options`."""
    options = transform_options(node)
    return TRANSFORMS.build(options.pop("name"), options, size=size)


def to_float() -> v2.Transform:
    """Convert images to float32 in [0, 1]; masks and boxes do not change."""
    return v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)


def squashed(side: int) -> v2.Transform:
    """Resize to `side` × `side` pixels; the aspect ratio is not kept."""
    return v2.Resize([side, side], antialias=True)


def centre_of_squashed(size: int) -> v2.Transform:
    """Squash (resize without keeping the aspect ratio) to size / 0.875 and crop the centre."""
    return v2.Compose([squashed(round(size / CROP_RATIO)), v2.CenterCrop(size), to_float()])


def of_known_range(image: Any) -> Any:
    """Check that the range of an image's values is known; turn a PIL image upright as its EXIF orientation says.

    Raises:
        InputError: unless it is a PIL image of 8 bits, or an array or a tensor of uint8 or of floats in [0, 1].
    """
    found, known = type(image).__name__, False
    if isinstance(image, Image.Image):
        found, known = f"a PIL image of mode {image.mode}", not image.mode.startswith(("I", "F"))
        image = turned(image, image)
    elif isinstance(image, Tensor | np.ndarray):
        image = image if isinstance(image, Tensor) or image.flags.writeable else image.copy()  # so torch does not warn
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
