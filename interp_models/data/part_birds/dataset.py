"""`part_birds`: drawn birds whose species differ in parts, with exact masks; made from a seed, nothing is shipped."""

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
    """Birds of 12 species, which are combinations of six parts' variants; six pairs differ in one part only.

    Colours, pose, light, background and occluders are drawn alike for all species, so that shape alone
    tells them apart. Every image has a box, a mask of the bird and of each part, and a key point of each part. An
    image is a pure function of seed, split and index.

    Args:
        split: "train" or "test", which have no image in common.
        train_per_class: images of each class in the train split.
        test_per_class: images of each class in the test split.
        image_size: side of the images, in pixels.
        seed: what the scenes are drawn from.
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
        """Split, label and index, as in "train/03_000027"."""
        return f"{self.split}/{self._label(index):02d}_{index:06d}"

    def annotation(self, index: int) -> str:
        """Class name, and what the image and its ground truth are drawn from."""
        return f"{self.classes[self._label(index)]} {self.split} {index} {self.image_size} pixels, seed {self.seed}"

    def scene(self, index: int) -> Scene:
        """The scene of image `index`; `drawing.draw` draws it, or a changed copy of it."""
        return make_scene(self.seed, self.split, index, self._label(index))

    def load(self, index: int) -> Sample:
        """Draw image `index`.

        The box is tight around the visible pixels of the bird, its right and lower edges exclusive. A key point is
        visible if the pixel under it shows the part.

        Raises:
            IndexError: if there is no such image.
        """
        image, masks, keypoints, visible = draw(self.scene(index), self.image_size)
        canvas = (self.image_size, self.image_size)
        return Sample(
            image=tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous()),
            label=self._label(index),
            index=index,
            box=tv_tensors.BoundingBoxes(_bounds(masks[0])[None], format="XYXY", canvas_size=canvas),
            masks=tv_tensors.Mask(torch.from_numpy(masks)),
            # torchvision counts from the middle of the first pixel
            parts=tv_tensors.KeyPoints(torch.from_numpy(keypoints) - 0.5, canvas_size=canvas),
            visible=torch.from_numpy(visible),
        )

    def _label(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"part_birds has no {self.split} image {index}, only 0 to {len(self) - 1}")
        return self.labels[index]


def _bounds(mask: NDArray[np.bool_]) -> torch.Tensor:
    """(4,) float32: left, top, right and bottom edges of what is in the mask; zeros if nothing is."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(x):
        return torch.zeros(4)
    return torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1], dtype=torch.float32)
