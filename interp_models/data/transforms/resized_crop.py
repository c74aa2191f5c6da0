"""Random resized crops, the usual augmentation for vision transformers."""

from torchvision.transforms import v2

from interp_models.data.transforms.base import TRANSFORMS, ImageTransform, centre_of_squashed, to_float


@TRANSFORMS.register("resized_crop")
class ResizedCrop(ImageTransform):
    """Random resized crop, flip and colour jitter.

    Training: crop 40 to 100 % of the area with an aspect ratio from 3 : 4 to 4 : 3, resize to the size, flip with
    probability 1/2, change brightness by up to 12.6 % and saturation by up to 50 %. Validation and test: squash to
    size / 0.875 (resize without keeping the aspect ratio), and the centre.

    Args:
        size: side of the output images in pixels.
    """

    def augmented(self) -> v2.Transform:
        """Crop, resize, flip and jitter."""
        return v2.Compose(
            [
                v2.RandomResizedCrop(self.size, scale=(0.4, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.126, saturation=0.5),
                to_float(),
            ]
        )

    def evaluation(self) -> v2.Transform:
        """Squash and crop the centre."""
        return centre_of_squashed(self.size)
