"""Crops between a corner and the box, then warps and jitter: ProtoTree's augmentation for CUB."""

import torch
from torchvision.transforms import v2

from interp_models.core.errors import InputError
from interp_models.data.base import Sample
from interp_models.data.transforms.base import TRANSFORMS
from interp_models.data.transforms.crops import around, cropped
from interp_models.data.transforms.warp_jitter import WarpJitter


@TRANSFORMS.register("corner_crop_warp_jitter")
class CornerCropWarpJitter(WarpJitter):
    """Crop between a corner and the box at random (`random_corner`), then warp and jitter as `WarpJitter`.

    Training images without augmentation, such as those of a push, are cropped to their box. Images of validation and
    test are squashed to the size (resized without keeping the aspect ratio).

    Source: the code of ProtoTree (Nauta et al. 2021), which writes five such crops of each image to files.

    Args:
        size: side of the output images in pixels.
        perspective: largest move of a corner, as a fraction of half the side, in [0, 1].
        jitter: brightness, contrast and saturation change by a factor from 1 - jitter to 1 + jitter.
        hue: largest shift of the hue, as a fraction of the circle, in [0, 0.5].
        degrees: largest rotation in degrees.
        shift: largest shift, as a fraction of the side; null shifts nothing.
        margin: side of the squashed image minus side of the crop, in pixels.
    """

    crops_training_images = True

    def augmented(self) -> v2.Transform:
        """Crop towards a corner, then warp and jitter."""
        return v2.Compose([random_corner, super().augmented()])


def random_corner(sample: Sample) -> Sample:
    """Return the whole image, or the part between one of its corners and the opposite edges of the box.

    The box is enlarged by a tenth of its sides. Torch's generator draws one of the five possibilities.

    Raises:
        InputError: if the sample has no box.
    """
    if sample.box is None or not len(sample.box):
        raise InputError(
            "data.transforms=corner_crop_warp_jitter needs a data set with boxes; warp_jitter works without boxes"
        )
    height, width = sample.image.shape[-2:]
    x0, y0, x1, y1 = around(sample.box)
    dx, dy = int(0.1 * (x1 - x0)), int(0.1 * (y1 - y0))
    corner = int(torch.randint(5, ()))
    if corner == 4:
        return sample
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    if corner in (0, 2):  # from the left edge of the image to the right edge of the box
        right = min(x1 + dx, right)
    else:
        left = max(x0 - dx, left)
    if corner in (0, 1):
        bottom = min(y1 + dy, bottom)
    else:
        top = max(y0 - dy, top)
    return cropped(sample, int(left), int(top), int(right), int(bottom))
