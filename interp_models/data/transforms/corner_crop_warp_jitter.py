"""Crops between a corner and the box, then warps and jitter: ProtoTree's augmentation for CUB."""

import torch
from torchvision.transforms import v2

from interp_models.core.errors import InputError
from interp_models.data.base import Sample
from interp_models.data.transforms.base import TRANSFORMS
from interp_models.data.transforms.crops import cropped
from interp_models.data.transforms.warp_jitter import WarpJitter


@TRANSFORMS.register("corner_crop_warp_jitter")
class CornerCropWarpJitter(WarpJitter):
    """Training: `random_corner`, then as `WarpJitter`. Training images that are not augmented, such as those that
    prototypes are projected on, are cropped to their box. All others are whole.

    Source: the code of ProtoTree (Nauta et al. 2021), which stores five such crops of each image.

    Args:
        size: side of the images that come out, in pixels.
        perspective: how far corners move, as a share of half the side.
        jitter: brightness, contrast and saturation change by a factor of 1 - jitter to 1 + jitter.
        hue: shift of the hue, as a share of the circle, at most 0.5.
        degrees: largest rotation.
        shift: largest shift, as a share of the side; None shifts nothing.
        margin: pixels by which the squashed image is larger than the crop.
    """

    crops_training_images = True

    def augmented(self) -> v2.Transform:
        """Crop towards a corner, then warp and jitter."""
        return v2.Compose([random_corner, super().augmented()])


def random_corner(sample: Sample) -> Sample:
    """The whole image, or what lies between one of its corners and the far ends of the box, a tenth larger than given.

    One of the five is drawn by torch's generator.

    Raises:
        InputError: if the sample has no box.
    """
    if sample.box is None:
        raise InputError(
            "data.transforms=corner_crop_warp_jitter needs a data set with boxes; warp_jitter does without"
        )
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
