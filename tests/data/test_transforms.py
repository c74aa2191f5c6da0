"""Registered transforms: the pixels of the papers' augmentations, and timm's own preparation."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import tv_tensors

from interp_models.core.errors import InputError
from interp_models.data.base import ImageDataset, Sample
from interp_models.data.module import TransformedDataset
from interp_models.data.transforms import TRANSFORMS, transform_of, transform_options

CARS = "cars"
OPTIONS = {
    "cars": {"name": "warp_jitter", "perspective": 0.5, "hue": 0.4, "degrees": 15, "shift": None, "margin": 32},
}


def smooth(height: int, width: int, seed: int) -> Tensor:
    """A smooth random image (3, H, W) of bytes."""
    small = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")[0]
    return (large * 255).round().to(torch.uint8)


class Three(ImageDataset):
    """Three smooth images with one box."""

    classes = ("a", "b")
    labels = (0, 1, 1)

    def image_id(self, index: int) -> str:
        return str(index)

    def load(self, index: int) -> Sample:
        size = [(70, 100), (120, 80), (64, 64)][index]
        box = tv_tensors.BoundingBoxes(torch.tensor([[10.0, 12.0, 50.0, 48.0]]), format="XYXY", canvas_size=size)
        return Sample(tv_tensors.Image(smooth(*size, index)), self.labels[index], index, box=box)


BEFORE = {
    ("crop_flip_jitter", 0, 0): [0.362527, 0.508061, 0.488453],
    ("crop_flip_jitter", 1, 1): [0.543355, 0.557734, 0.585185],
    ("crop_flip_jitter", 2, 0): [0.417865, 0.524619, 0.53159],
    ("crop_flip_jitter", 3, 2): [0.517211, 0.591721, 0.407407],
    ("resized_crop", 0, 0): [0.43268, 0.517647, 0.489325],
    ("resized_crop", 1, 1): [0.535076, 0.481046, 0.605665],
    ("resized_crop", 2, 0): [0.376471, 0.506318, 0.372985],
    ("resized_crop", 3, 2): [0.488017, 0.574292, 0.420915],
    ("warp_flip", 0, 0): [0.380392, 0.467102, 0.479303],
    ("warp_flip", 1, 1): [0.345534, 0.34597, 0.400871],
    ("warp_flip", 2, 0): [0.212636, 0.379956, 0.383007],
    ("warp_flip", 3, 2): [0.419172, 0.455773, 0.339869],
    ("corner_crop_warp_jitter", 0, 0): [0.305447, 0.336819, 0.289325],
    ("corner_crop_warp_jitter", 1, 1): [0.35512, 0.314161, 0.330719],
    ("corner_crop_warp_jitter", 2, 0): [0.305011, 0.383007, 0.354248],
    ("corner_crop_warp_jitter", 3, 2): [0.392593, 0.430065, 0.281481],
    (CARS, 0, 0): [0.213943, 0.291503, 0.277996],
    (CARS, 1, 1): [0.296732, 0.305447, 0.299346],
    (CARS, 2, 0): [0.453595, 0.452288, 0.471895],
    (CARS, 3, 2): [0.407407, 0.599129, 0.497168],
}
"""Means by colour of every sixteenth pixel, as the version before transforms were registered made it, by (transform,
epoch, position) at seed 5 and 48 pixels. (All pixels of 480 images were equal to the last bit.)"""


@pytest.mark.parametrize(("name", "epoch", "position"), BEFORE)
def test_augmented_pixels_are_those_of_the_version_before(name: str, epoch: int, position: int) -> None:
    transform = transform_of(OPTIONS.get(name, name), 48).augmented()
    image = TransformedDataset(Three(), np.arange(3), transform, 5)[epoch, position].image.as_subclass(Tensor)
    found = image[:, ::16, ::16].double().mean(dim=(1, 2))
    expected = torch.tensor(BEFORE[name, epoch, position], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("crop_pct", "crop_mode"), [(0.875, "center"), (0.9, "center"), (1.0, "squash")])
def test_shorter_side_is_timms_preparation(interpolation: str, crop_pct: float, crop_mode: str) -> None:
    """Up to the rounding of grey levels between resizing and cropping, of which PIL's has two."""
    options = {"crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": crop_mode}
    for height, width in ((90, 130), (130, 90), (64, 64), (40, 31)):
        image = smooth(height, width, height)
        made = transform_of({"name": "shorter_side", **options}, 64).evaluation()(tv_tensors.Image(image))
        theirs = create_transform((3, 64, 64), mean=(0, 0, 0), std=(1, 1, 1), **options)
        expected = theirs(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert made.shape == expected.shape == (3, 64, 64)
        away = (made.as_subclass(Tensor) - expected).abs()
        assert float(away.max()) <= 1.01 / 255


def test_a_transform_is_a_name_or_a_mapping() -> None:
    assert transform_options("warp_flip") == {"name": "warp_flip"}
    options = transform_options({"name": "warp_jitter", "margin": 8})
    expected = {"perspective": 0.2, "jitter": 0.4, "hue": 0.02, "degrees": 10.0, "shift": 0.05, "margin": 8}
    assert options == {"name": "warp_jitter", **expected}
    assert transform_options(options) == options
    assert transform_of(options, 20).size == 20
    for node, message in (
        ("warp_flop", "unknown transform 'warp_flop'; did you mean 'warp_flip'"),
        (
            {"name": "warp_jitter", "margins": 8},
            "unknown key in transform 'warp_jitter': 'margins'; did you mean 'margin'",
        ),
        ({"name": "warp_jitter", "margin": "wide"}, "transform 'warp_jitter'.margin"),
        ({"margin": 8}, "data.transforms.name must be given"),
        (3, "data.transforms: expected a name, or a mapping"),
        ({"name": "warp_jitter", "hue": 0.7}, "hue in \\[0, 0.5\\]"),
        ({"name": "shorter_side", "crop_pct": 0.0}, "crop_pct must be above 0"),
        ({"name": "shorter_side", "interpolation": "lanczos"}, "transform 'shorter_side'.interpolation"),
    ):
        with pytest.raises(InputError, match=message):
            transform_of(node, 20)


def test_names_say_what_a_transform_does() -> None:
    """And no architecture's."""
    from interp_models import MODELS

    assert not [name for name in TRANSFORMS if any(model in name for model in MODELS)]
