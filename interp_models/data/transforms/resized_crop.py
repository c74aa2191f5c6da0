"""Random crops stretched to one size, as is usual for vision transformers."""

from torchvision.transforms import v2

from interp_models.data.transforms.base import TRANSFORMS, ImageTransform, centre_of_squashed, to_float


@TRANSFORMS.register("resized_crop")
class ResizedCrop(ImageTransform):
    """Training: crop 40 to 100 % of the area, of sides 3 : 4 to 4 : 3, stretch to the size, flip with probability 1/2,
    change brightness by up to 12.6 % and saturation by up to 50 %. Else: squash to size / 0.875, and the centre.

    Args:
        size: side of the images that come out, in pixels.
    """

    def augmented(self) -> v2.Transform:
        """Crop, stretch, flip and jitter."""
        return v2.Compose(
            [
                v2.RandomResizedCrop(self.size, scale=(0.4, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.126, saturation=0.5),
                to_float(),
            ]
        )

    def evaluation(self) -> v2.Transform:
        """The centre."""
        return centre_of_squashed(self.size)
