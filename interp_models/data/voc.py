"""PASCAL VOC: images of several objects of 20 classes, with boxes and masks."""

import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets.voc import DATASET_YEAR_DICT

from interp_models.core.errors import InputError
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, decode_image, labels_of
from interp_models.data.decoding import decode_classes
from interp_models.data.download import download_archive
from interp_models.data.voc_xml import objects_of

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LISTS = {"2012": {"train": "train", "test": "val"}, "2007": {"train": "trainval", "test": "test"}}
"""Official list of each split."""


@DATASETS.register("voc")
class VOC(ImageDataset):
    """PASCAL VOC (Everingham et al. 2010): every image has several labels, and a box for every object.

    The folder has the official layout. Of 2012, whose test annotations are not public, `train` has 5,717 images and
    `test` is the official `val` with 5,823; of 2007 they are `trainval` (5,011) and `test` (4,952). Objects marked
    as difficult are left out, as in the official evaluation: they have no box, and make no label.

    Args:
        split: `train` or `test`.
        root: the folder with `VOCdevkit`.
        year: `2012` or `2007`.
        masks: whether to use only the images with masks (1,464 and 1,449 of 2012, 422 and 210 of 2007), and to load
            them. The open border of objects counts as background.
        download: whether to download the year's `train` and `val` (2 GB) into `root` if they are missing. The test
            images of 2007 are another archive, which is not downloaded.

    Raises:
        InputError: if a part of the data set is missing or malformed, or a download fails.
    """

    multilabel = True
    classes = CLASSES

    def __init__(
        self,
        *,
        split: Literal["train", "test"],
        root: PathText,
        year: Literal["2012", "2007"] = "2012",
        masks: bool = False,
        download: bool = False,
    ) -> None:
        top = Path(root).expanduser()
        if download and not (top / "VOCdevkit").exists():
            about = DATASET_YEAR_DICT[year]
            download_archive(about["url"], about["md5"], top / "VOCdevkit")
        self._folder, self.masks = top / "VOCdevkit" / f"VOC{year}", masks
        kind, name = "Segmentation" if masks else "Main", LISTS[year][split]
        if masks and year == "2007" and split == "test":
            name = "test"
        path = self._folder / "ImageSets" / kind / f"{name}.txt"
        try:
            self._names = path.read_text().split()
        except OSError as error:
            parts = "VOCdevkit with JPEGImages, Annotations and ImageSets"
            raise InputError(f"PASCAL VOC: {path} cannot be read ({error.strerror}); {top} must hold {parts}") from None
        annotations = (self._folder / "Annotations" / f"{name}.xml" for name in self._names)
        self._objects = [[one for one in objects_of(file) if not one.difficult] for file in annotations]
        for name, own in zip(self._names, self._objects, strict=True):
            if wrong := [one.name for one in own if one.name not in CLASSES]:
                raise InputError(f"PASCAL VOC: image {name} has an object of the unknown class {wrong[0]!r}")
        self.labels = [tuple(sorted({CLASSES.index(one.name) for one in own})) for own in self._objects]

    def image_id(self, index: int) -> str:
        """The file name of the image."""
        return f"{self._names[index]}.jpg"

    def files(self, index: int) -> tuple[Path, ...]:
        """The image's file and, with masks, that of the classes of its pixels."""
        name = self._names[index]
        image = self._folder / "JPEGImages" / f"{name}.jpg"
        return (image, self._folder / "SegmentationClass" / f"{name}.png") if self.masks else (image,)

    def annotation(self, index: int) -> str:
        """Class and box of every object."""
        return json.dumps([one[:2] for one in self._objects[index]])

    def load(self, index: int) -> Sample:
        """Image `index` with its labels, its boxes and, if wanted, a mask of each of its classes.

        Raises:
            InputError: if a file is missing or cannot be decoded, or their sizes differ.
        """
        file, *of_classes = self.files(index)
        image, own = decode_image(file, upright=False), self._objects[index]
        size = (image.shape[-2], image.shape[-1])
        boxes = torch.tensor([one.box for one in own]).reshape(-1, 4)
        labels = torch.tensor([CLASSES.index(one.name) for one in own], dtype=torch.int64)
        masks: Tensor | None = None
        present = torch.tensor(labels_of(self, index), dtype=torch.int64)
        if of_classes:
            pixels = decode_classes(of_classes[0])
            if pixels.shape != image.shape[-2:]:
                raise InputError(f"PASCAL VOC: {of_classes[0]} has another size than its image")
            masks = tv_tensors.Mask(pixels == present[:, None, None] + 1)  # 0 is background, 255 the border
        return Sample(
            image, self.target(index), index, tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size), masks,
            box_classes=labels, mask_classes=None if masks is None else present,
        )  # fmt: skip
