"""A plugin: drawn images with several labels each. Squares of three colours; an image may have all of them, or none."""

from typing import Literal

import torch
from torchvision import tv_tensors

from interp_models.core.rng import uniform
from interp_models.data.base import DATASETS, ImageDataset, Sample

SETS = [(0,), (0, 1), (), (2,), (1, 2), (0, 1, 2), (1,), (0, 2)]
"""Labels of the images, in turn."""
SIDE = 64


@DATASETS.register("squares")
class Squares(ImageDataset):
    """A red square at the left top, a green one at the right top and a blue one at the left bottom, on noise.

    Args:
        split: `train` or `test`.
        count: number of images.
        one: whether to keep only the first label of an image; an image without one becomes red.
        plain: as `one`, and images have single classes.
    """

    drawn = True

    def __init__(
        self, *, split: Literal["train", "test"], count: int = 16, one: bool = False, plain: bool = False
    ) -> None:
        self.split, self.classes, self.multilabel = split, ["red", "green", "blue"], not plain
        own = [SETS[index % len(SETS)] for index in range(count)]
        self.drawn_labels = [labels[:1] or (0,) for labels in own] if one or plain else own
        self.labels = [labels[0] for labels in self.drawn_labels] if plain else list(self.drawn_labels)

    def image_id(self, index: int) -> str:
        return f"{self.split}/{index}"

    def load(self, index: int) -> Sample:
        places = torch.arange(3 * SIDE * SIDE).numpy()
        noise = torch.from_numpy(uniform(self.split == "test", index, places)).view(3, SIDE, SIDE)
        image = (60 * noise).byte()
        for label in self.drawn_labels[index]:
            top, left = 40 * (label == 2), 40 * (label == 1)
            image[label, top : top + 20, left : left + 20] = 255
        return Sample(image=tv_tensors.Image(image), label=self.target(index), index=index)
