"""Oxford-IIIT Pet: breeds of cats and dogs, with masks."""

from pathlib import Path
from typing import Literal

import torch
from torchvision import tv_tensors
from torchvision.datasets import OxfordIIITPet
from torchvision.ops import masks_to_boxes

from interp_models.core.errors import InputError
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, decode_image, printable
from interp_models.data.download import download_archive

ANIMAL = 1
"""Value of the animal's pixels in a trimap; 2 is background, 3 the border that annotators left open."""


@DATASETS.register("pets")
class Pets(ImageDataset):
    """Oxford-IIIT Pet (Parkhi et al., CVPR 2012): 3,680 training images (its `trainval`), 3,669 test images, 37 breeds.

    The folder has the official layout. The mask of the animal is the first value of the trimaps. Their border, which
    may belong to the animal or not, counts as background. The box is the one around the mask: the official boxes are
    those of heads, and only of some images.

    Args:
        split: `train` or `test`.
        root: the folder with `images` and `annotations`, or its parent, if it is named `oxford-iiit-pet`.
        download: whether to download the images and annotations (0.8 GB) into `root`/oxford-iiit-pet.

    Raises:
        InputError: if a part of the data set is missing, a list is malformed, or a download fails.
    """

    mask_names = ("animal",)

    def __init__(self, *, split: Literal["train", "test"], root: PathText, download: bool = False) -> None:
        top = Path(root).expanduser()
        inner = top / "oxford-iiit-pet"
        folder = inner if inner.is_dir() or download else top
        for (url, md5), name in zip(OxfordIIITPet._RESOURCES, ("images", "annotations"), strict=True):
            if download and not (folder / name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                download_archive(url, md5, folder / name)
        names = {key: _listed(folder / "annotations" / f"{file}.txt") for key, file in LISTS.items()}
        known = sorted({number for rows in names.values() for _, number in rows})
        breed = {number: name.rpartition("_")[0] for rows in names.values() for name, number in rows}
        self.classes = [printable(breed[number].replace("_", " ")) for number in known]
        self._folder, self._names = folder, [name for name, _ in names[split]]
        self.labels = [known.index(number) for _, number in names[split]]

    def image_id(self, index: int) -> str:
        """The file name of the image."""
        return printable(f"{self._names[index]}.jpg")

    def files(self, index: int) -> tuple[Path, ...]:
        """The image's file and its trimap."""
        name = self._names[index]
        return self._folder / "images" / f"{name}.jpg", self._folder / "annotations" / "trimaps" / f"{name}.png"

    def load(self, index: int) -> Sample:
        """Image `index` with its label, the mask of the animal and the box around it.

        Raises:
            InputError: if a file is missing or cannot be decoded, or their sizes differ.
        """
        file, trimap = self.files(index)
        image, mask = decode_image(file, upright=False), decode_image(trimap, upright=False)[:1] == ANIMAL
        if mask.shape[-2:] != image.shape[-2:]:
            raise InputError(f"Oxford-IIIT Pet: {trimap} has another size than its image")
        box = masks_to_boxes(mask) + torch.tensor([0, 0, 1, 1]) if mask.any() else torch.zeros(0, 4)
        size = (image.shape[-2], image.shape[-1])
        boxes = tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=size)
        return Sample(image, self.labels[index], index, boxes, tv_tensors.Mask(mask))


LISTS = {"train": "trainval", "test": "test"}


def _listed(path: Path) -> list[tuple[str, int]]:
    """Name and class number of every image of a list."""
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        return [(row[0], int(row[1])) for row in rows]
    except FileNotFoundError:
        expected = "images, annotations/trimaps, annotations/trainval.txt and annotations/test.txt"
        raise InputError(f"Oxford-IIIT Pet: {path} is missing; {path.parent.parent} must hold {expected}") from None
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"Oxford-IIIT Pet: {path} cannot be read: {error}") from None
