"""Perspective, jitter, flip and affine map in random order: ProtoTree's augmentation for cars."""

from torchvision.transforms import v2

from interp_models.core.errors import InputError
from interp_models.data.transforms.base import TRANSFORMS, ImageTransform, squashed, to_float


@TRANSFORMS.register("warp_jitter")
class WarpJitter(ImageTransform):
    """Perspective, colour jitter, flip and affine map in random order, then a random crop.

    Training: squash to size + margin (resize without keeping the aspect ratio). Then come, in random order, a
    perspective with probability 1/2, colour jitter, a flip with probability 1/2, and a rotation with a shear of up to 2
    degrees. A random crop of the size is the last. Validation and test: squash to the size.

    Source: the code of ProtoTree (Nauta et al. 2021). The defaults are its values for CUB. Its values for cars are
    `perspective: 0.5, hue: 0.4, degrees: 15, shift: null, margin: 32`.

    Args:
        size: side of the output images in pixels.
        perspective: largest move of a corner, as a fraction of half the side, in [0, 1].
        jitter: brightness, contrast and saturation change by a factor from 1 - jitter to 1 + jitter.
        hue: largest shift of the hue, as a fraction of the circle, in [0, 0.5].
        degrees: largest rotation in degrees.
        shift: largest shift, as a fraction of the side; null shifts nothing.
        margin: side of the squashed image minus side of the crop, in pixels.
    """

    def __init__(
        self,
        size: int,
        *,
        perspective: float = 0.2,
        jitter: float = 0.4,
        hue: float = 0.02,
        degrees: float = 10.0,
        shift: float | None = 0.05,
        margin: int = 0,
    ) -> None:
        super().__init__(size)
        shares = (perspective, jitter, 2 * hue, shift or 0.0)
        if not all(0 <= share <= 1 for share in shares) or degrees < 0 or margin < 0:
            raise InputError(
                "data.transforms: perspective, jitter and shift must be in [0, 1], hue in [0, 0.5], degrees and margin "
                f"at least 0; got {perspective}, {jitter}, {shift}, {hue}, {degrees}, {margin}"
            )
        self.perspective, self.jitter, self.hue = perspective, jitter, hue
        self.degrees, self.shift, self.margin = degrees, shift, margin

    def augmented(self) -> v2.Transform:
        """Squash; warp, jitter and flip in random order; crop."""
        change = (1 - self.jitter, 1 + self.jitter)
        shift = None if self.shift is None else (self.shift, self.shift)
        bilinear = v2.InterpolationMode.BILINEAR
        in_any_order = v2.RandomOrder(
            [
                v2.RandomPerspective(self.perspective, p=0.5),
                v2.ColorJitter(change, change, change, self.hue),
                v2.RandomHorizontalFlip(),
                v2.RandomAffine(self.degrees, shift, shear=(-2, 2), interpolation=bilinear),
            ]
        )
        return v2.Compose([squashed(self.size + self.margin), in_any_order, v2.RandomCrop(self.size), to_float()])

    def evaluation(self) -> v2.Transform:
        """Squash to the size."""
        return v2.Compose([squashed(self.size), to_float()])
