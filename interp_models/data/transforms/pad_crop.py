"""Crops of a padded image: the usual augmentation of small images."""

from torchvision.transforms import v2

from interp_models.data.transforms.base import TRANSFORMS, ImageTransform, squashed, to_float


@TRANSFORMS.register("pad_crop")
class PadCrop(ImageTransform):
    """Squash, pad, random crop and flip, as usual for CIFAR-10 (He et al., CVPR 2016, section 4.2).

    Training: squash to the size (resize without keeping the aspect ratio), pad by size / 8 black pixels on each side,
    crop at a random place and, if asked for, flip with probability 1/2. Validation and test: squash.

    Args:
        size: side of the output images in pixels.
        flip: whether images are flipped; false for digits.
    """

    def __init__(self, size: int, *, flip: bool = True) -> None:
        super().__init__(size)
        self.flip = flip

    def augmented(self) -> v2.Transform:
        """Squash, pad, crop and flip."""
        flips = [v2.RandomHorizontalFlip()] if self.flip else []
        crop = v2.RandomCrop(self.size, padding=self.size // 8)
        return v2.Compose([squashed(self.size), crop, *flips, to_float()])

    def evaluation(self) -> v2.Transform:
        """Squash to the size."""
        return v2.Compose([squashed(self.size), to_float()])
