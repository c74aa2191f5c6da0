"""ImageNet: 1000 classes, with boxes."""

import json
from pathlib import Path
from typing import Literal

import torch
from torchvision import tv_tensors

from interp_models.core.errors import InputError
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, decode_image, printable
from interp_models.data.listing import files_of
from interp_models.data.voc_xml import Box, objects_of

FOLDERS = {"train": "train", "test": "val"}
CLASSES = 1000


@DATASETS.register("imagenet")
class ImageNet(ImageDataset):
    """ImageNet (ILSVRC 2012; Russakovsky et al. 2015): 1,281,167 training images and 50,000 test images (its `val`).

    Images lie in folders of their WordNet id: `train/n01440764/*.JPEG` and `val/n01440764/*.JPEG`, as torchvision and
    timm expect them. Classes are numbered as there, by the order of the 1000 ids, also if some have no image here.
    Boxes are the official ones, of all objects of the class; an image without a file has none.

    Args:
        split: `train` or `test`.
        root: the folder with `train` and `val`.
        boxes: a folder with the XML files of the boxes, of `ILSVRC2012_bbox_train_v2.tar.gz` and
            `ILSVRC2012_bbox_val_v3.tgz`, at any depth; null loads no boxes.

    Raises:
        InputError: if a folder is missing, a class is unknown, or an annotation cannot be read.
    """

    def __init__(self, *, split: Literal["train", "test"], root: PathText, boxes: PathText | None = None) -> None:
        from timm.data.imagenet_info import ImageNetInfo

        info, folder = ImageNetInfo(), Path(root).expanduser() / FOLDERS[split]
        ids = [str(info.index_to_label_name(label)) for label in range(CLASSES)]
        self.classes = [str(info.index_to_description(label)) for label in range(len(ids))]
        if not folder.is_dir():
            raise InputError(f"ImageNet: {folder} is missing; {folder.parent} must hold train and val")
        present = sorted(path for path in folder.iterdir() if path.is_dir())
        if wrong := [path.name for path in present if path.name not in ids]:
            raise InputError(
                f"ImageNet: {folder / wrong[0]} is not named by one of the 1000 WordNet ids, such as n01440764"
            )
        found, left_out = files_of([(path, path.name) for path in present], folder, split)
        self.left_out = left_out
        self._paths = [one.path for one in found]
        self._ids = [one.name for one in found]
        self.labels = [ids.index(one.label) for one in found]
        self._boxes: list[list[Box]] | None = None
        if boxes is not None:
            files = {path.stem: path for path in Path(boxes).expanduser().rglob("*.xml")}
            if not files:
                raise InputError(f"ImageNet: there is no XML file in boxes={boxes}")
            own = (objects_of(files[path.stem]) if path.stem in files else [] for path in self._paths)
            labels = (ids[label] for label in self.labels)
            self._boxes = [
                [one.box for one in objects if one.name == label] for objects, label in zip(own, labels, strict=True)
            ]

    def image_id(self, index: int) -> str:
        """The path of the image in the folder of its split."""
        return printable(self._ids[index])

    def files(self, index: int) -> tuple[Path, ...]:
        """The image's file."""
        return (self._paths[index],)

    def annotation(self, index: int) -> str:
        """Class name and boxes."""
        boxes = [] if self._boxes is None else self._boxes[index]
        return json.dumps([self.classes[self.labels[index]], boxes])

    def load(self, index: int) -> Sample:
        """Image `index` with its label and its boxes.

        Raises:
            InputError: if the file cannot be decoded.
        """
        image = decode_image(self._paths[index], upright=False)  # boxes refer to the pixels of the file
        if self._boxes is None:
            return Sample(image, self.labels[index], index)
        size = (image.shape[-2], image.shape[-1])
        boxes = torch.tensor(self._boxes[index]).reshape(-1, 4)
        return Sample(
            image, self.labels[index], index, tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        )
