"""`part_birds`: drawn birds whose species differ in parts, with exact masks. Images are made from a seed."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors

from interp_models.core.errors import InputError
from interp_models.data.base import DATASETS, ImageDataset, Sample
from interp_models.data.part_birds.drawing import PARTS, draw
from interp_models.data.part_birds.scene import CLASSES, Scene, make_scene


@DATASETS.register("part_birds")
class PartBirds(ImageDataset):
    """Drawn birds of 12 species that differ in six parts, with exact ground truth.

    A species is a combination of variants of the six parts; six pairs of species differ in only one part. Colours,
    pose, light, background and occluders have the same distribution for all species, so only shapes tell them apart.
    Every image has a box, masks of the bird and of each part, and a key point of each part. An image is a pure function
    of seed, split and index.

    Args:
        split: `train` or `test`; they have no image in common.
        train_per_class: number of training images per class.
        test_per_class: number of test images per class.
        image_size: side of the images in pixels, at least 32.
        seed: seed of the scenes.
    """

    drawn = True
    part_names = PARTS
    mask_names = ("bird", *PARTS)

    def __init__(
        self,
        *,
        split: Literal["train", "test"],
        train_per_class: int = 60,
        test_per_class: int = 20,
        image_size: int = 224,
        seed: int = 0,
    ) -> None:
        if split not in ("train", "test"):
            raise InputError(f"part_birds: split must be 'train' or 'test', not {split!r}")
        for name, value, least in (
            ("train_per_class", train_per_class, 1),
            ("test_per_class", test_per_class, 1),
            ("image_size", image_size, 32),
        ):
            if value < least:
                raise InputError(f"part_birds: {name} must be at least {least}, not {value}")
        self.split = split
        self.image_size = image_size
        self.seed = seed
        self.classes = tuple(CLASSES)
        self.labels = list(range(len(CLASSES))) * (train_per_class if split == "train" else test_per_class)

    def image_id(self, index: int) -> str:
        """Split, label and index, such as "train/03_000027"."""
        return f"{self.split}/{self._label(index):02d}_{index:06d}"

    def annotation(self, index: int) -> str:
        """The class name, and all values that determine the image and its ground truth."""
        return f"{self.classes[self._label(index)]} {self.split} {index} {self.image_size} pixels, seed {self.seed}"

    def scene(self, index: int) -> Scene:
        """The scene of image `index`. `drawing.draw` draws it, or a changed copy of it."""
        return make_scene(self.seed, self.split, index, self._label(index))

    def load(self, index: int) -> Sample:
        """Draw image `index`.

        The box is tight around the visible pixels of the bird; its right and lower edges are exclusive. A key point is
        visible if its pixel shows the part.

        Raises:
            IndexError: if `index` is out of range.
        """
        image, masks, keypoints, visible = draw(self.scene(index), self.image_size)
        canvas = (self.image_size, self.image_size)
        return Sample(
            image=tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous()),
            label=self._label(index),
            index=index,
            box=tv_tensors.BoundingBoxes(_bounds(masks[0])[None], format="XYXY", canvas_size=canvas),
            masks=tv_tensors.Mask(torch.from_numpy(masks)),
            # in torchvision the middle of the first pixel is 0
            parts=tv_tensors.KeyPoints(torch.from_numpy(keypoints) - 0.5, canvas_size=canvas),
            visible=torch.from_numpy(visible),
        )

    def _label(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"part_birds has no {self.split} image {index}, only 0 to {len(self) - 1}")
        return int(self.labels[index])


def _bounds(mask: NDArray[np.bool_]) -> torch.Tensor:
    """(4,) float32: left, top, right and bottom edges of a mask; zeros if the mask is empty."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(x):
        return torch.zeros(4)
    return torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1], dtype=torch.float32)
