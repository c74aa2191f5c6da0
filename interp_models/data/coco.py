"""COCO: images of several objects of 80 classes, with boxes and masks."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision import tv_tensors

from interp_models.core.errors import InputError
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, decode_image, labels_of

SPLITS = {"train": "train", "test": "val"}


@DATASETS.register("coco")
class COCO(ImageDataset):
    """COCO (Lin et al., ECCV 2014): every image has several labels, and a box and a mask for every object.

    The folder has the official layout; the test split is the official `val`, as the annotations of its test images are
    not public: of 2017 there are 118,287 images to train on, and 5,000 to test. Groups of objects (`iscrowd`) are left
    out: they have no box, and make no label. Masks are drawn from the polygons of the objects.

    Args:
        split: `train` or `test`.
        root: the folder with `annotations/instances_train2017.json`, `annotations/instances_val2017.json`, `train2017`
            and `val2017`, from the archives `annotations_trainval2017.zip`, `train2017.zip` and `val2017.zip` of
            cocodataset.org.
        year: `2017` or `2014`.

    Raises:
        InputError: if a part of the data set is missing or malformed.
    """

    multilabel = True

    def __init__(
        self, *, split: Literal["train", "test"], root: PathText, year: Literal["2017", "2014"] = "2017"
    ) -> None:
        top, name = Path(root).expanduser(), f"{SPLITS[split]}{year}"
        path = top / "annotations" / f"instances_{name}.json"
        try:
            content = json.loads(path.read_text())
            kinds = sorted(content["categories"], key=lambda kind: int(kind["id"]))
            images = sorted(content["images"], key=lambda image: int(image["id"]))
            number = {int(kind["id"]): label for label, kind in enumerate(kinds)}
            objects: dict[int, list[tuple[int, list[float], Any]]] = defaultdict(list)
            for one in content["annotations"]:
                if not one.get("iscrowd", 0):
                    objects[int(one["image_id"])].append(
                        (number[int(one["category_id"])], [float(v) for v in one["bbox"]], one["segmentation"])
                    )
            self._files = [str(image["file_name"]) for image in images]
            self._objects = [objects[int(image["id"])] for image in images]
            self.classes = [str(kind["name"]) for kind in kinds]
        except FileNotFoundError:
            parts = f"annotations/instances_{name}.json and {name}"
            raise InputError(f"COCO: {path} is missing; {top} must hold {parts}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"COCO: {path} cannot be read: {type(error).__name__}: {error}") from None
        self._folder = top / name
        self.labels = [tuple(sorted({label for label, _, _ in own})) for own in self._objects]

    def image_id(self, index: int) -> str:
        """The file name of the image."""
        return self._files[index]

    def files(self, index: int) -> tuple[Path, ...]:
        """The image's file."""
        return (self._folder / self._files[index],)

    def annotation(self, index: int) -> str:
        """Class, box and polygons of every object."""
        return json.dumps([(self.classes[label], box, shape) for label, box, shape in self._objects[index]])

    def load(self, index: int) -> Sample:
        """Image `index` with its labels, its boxes, and a mask of each of its classes.

        Raises:
            InputError: if the file is missing or cannot be decoded, or a mask is no polygon.
        """
        image, own = decode_image(self.files(index)[0], upright=False), self._objects[index]
        size = (image.shape[-2], image.shape[-1])
        boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h), _ in own]).reshape(-1, 4)
        present = labels_of(self, index)
        masks = torch.zeros(len(present), *size, dtype=torch.bool)
        for label, _, polygons in own:
            masks[present.index(label)] |= self._drawn(polygons, size, index)
        return Sample(
            image, self.target(index), index, tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            tv_tensors.Mask(masks), box_classes=torch.tensor([label for label, _, _ in own], dtype=torch.int64),
            mask_classes=torch.tensor(present, dtype=torch.int64),
        )  # fmt: skip

    def _drawn(self, polygons: Any, size: tuple[int, int], index: int) -> Tensor:
        """The mask (H, W) of an object's polygons, each a list x, y, x, y, ..."""
        drawing = Image.new("1", (size[1], size[0]))
        if not isinstance(polygons, list):
            raise InputError(f"COCO: an object of {self._files[index]} has a mask that is no list of polygons")
        for polygon in polygons:
            # Pillow counts pixels by their centres, the annotations by their corners.
            ImageDraw.Draw(drawing).polygon([float(v) - 0.5 for v in polygon], fill=1)
        return torch.from_numpy(np.asarray(drawing).copy())
