"""Resize of the shorter side and centre crop, the usual test transform of ImageNet and timm models."""

import math
from typing import Literal

from torchvision.transforms import v2

from interp_models.core.errors import InputError
from interp_models.data.transforms.base import TRANSFORMS, ImageTransform, to_float

Interpolation = Literal["bilinear", "bicubic"]


@TRANSFORMS.register("shorter_side")
class ShorterSide(ImageTransform):
    """Random resized crop and flip in training; resize of the shorter side and centre crop otherwise.

    Training: crop 8 to 100 % of the area with an aspect ratio from 3 : 4 to 4 : 3, resize to the size, flip with
    probability 1/2 (Szegedy et al., CVPR 2015). Validation and test: resize to floor(size / crop_pct), and crop the
    centre.

    The options mean the same as in timm's data config. Images are not normalised: black is 0.

    Args:
        size: side of the output images in pixels.
        crop_pct: side of the crop ÷ side of the resized image.
        interpolation: interpolation of the resize, with antialiasing.
        crop_mode: `center` resizes the shorter side and keeps the aspect ratio; `squash` resizes both sides.
    """

    def __init__(
        self,
        size: int,
        *,
        crop_pct: float = 0.875,
        interpolation: Interpolation = "bicubic",
        crop_mode: Literal["center", "squash"] = "center",
    ) -> None:
        super().__init__(size)
        if not 0 < crop_pct <= 1:
            raise InputError(f"data.transforms: crop_pct must be above 0 and at most 1; got {crop_pct}")
        self.crop_pct, self.crop_mode = crop_pct, crop_mode
        self.interpolation = v2.InterpolationMode(interpolation)

    def augmented(self) -> v2.Transform:
        """Crop, resize and flip."""
        crop = v2.RandomResizedCrop(self.size, scale=(0.08, 1.0), interpolation=self.interpolation, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(), to_float()])

    def evaluation(self) -> v2.Transform:
        """Resize and crop the centre."""
        side = math.floor(self.size / self.crop_pct)
        sides = [side] if self.crop_mode == "center" else [side, side]
        resize = v2.Resize(sides, interpolation=self.interpolation, antialias=True)
        return v2.Compose([resize, v2.CenterCrop(self.size), to_float()])
