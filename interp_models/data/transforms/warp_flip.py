"""A rotation, a perspective or a shear, and a flip: ProtoPNet's augmentation."""

from torchvision.transforms import v2

from interp_models.data.transforms.base import TRANSFORMS, ImageTransform, squashed, to_float


@TRANSFORMS.register("warp_flip")
class WarpFlip(ImageTransform):
    """Squash, one random warp and a flip.

    Training: squash to the size (resize without keeping the aspect ratio); then either rotate by up to 15 degrees,
    change the perspective, or shear by up to 10 degrees; flip with probability 1/2. Validation and test: squash.

    Source: the code of ProtoPNet (Chen et al. 2019), which writes 30 such copies of each image to files.

    Args:
        size: side of the output images in pixels.
    """

    def augmented(self) -> v2.Transform:
        """Squash, warp and flip."""
        bilinear = v2.InterpolationMode.BILINEAR
        warps = [
            v2.RandomRotation(15, interpolation=bilinear),
            v2.RandomPerspective(0.2, p=1.0),
            v2.RandomAffine(0, shear=(-10, 10, -10, 10), interpolation=bilinear),
        ]
        return v2.Compose([squashed(self.size), v2.RandomChoice(warps), v2.RandomHorizontalFlip(), to_float()])

    def evaluation(self) -> v2.Transform:
        """Squash to the size."""
        return v2.Compose([squashed(self.size), to_float()])
