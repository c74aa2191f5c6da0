"""Random crop, flip and jitter of a squashed image: WS-DAN's augmentation, and BR-NPA's."""

from torchvision.transforms import v2

from interp_models.data.transforms.base import (
    CROP_RATIO,
    TRANSFORMS,
    ImageTransform,
    centre_of_squashed,
    squashed,
    to_float,
)


@TRANSFORMS.register("crop_flip_jitter")
class CropFlipJitter(ImageTransform):
    """Squash, random crop, flip and colour jitter.

    Training: squash to size / 0.875 (resize without keeping the aspect ratio), crop at a random place, flip with
    probability 1/2, change brightness by up to 12.6 % and saturation by up to 50 %. Validation and test: the same
    squash, and the centre.

    Source: the code of WS-DAN (Hu and Qi 2019) and of BR-NPA (Gomez et al. 2022).

    Args:
        size: side of the output images in pixels.
    """

    def augmented(self) -> v2.Transform:
        """Crop, flip and jitter."""
        return v2.Compose(
            [
                squashed(round(self.size / CROP_RATIO)),
                v2.RandomCrop(self.size),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.126, saturation=0.5),
                to_float(),
            ]
        )

    def evaluation(self) -> v2.Transform:
        """Squash and crop the centre."""
        return centre_of_squashed(self.size)
