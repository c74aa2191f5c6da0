"""CUB-200-2011: birds with boxes, 15 key points and, if their archive is unpacked too, masks."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision import tv_tensors

from interp_models.core.errors import InputError, unknown
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, decode_image, printable
from interp_models.data.download import download_archive
from interp_models.data.transforms import hide_outside

# The archives of CaltechDATA's records 65de6-vp158 and w9d68-gec53, with the MD5 sums published there.
IMAGES_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
IMAGES_MD5 = "97eceeb196236b17998738112f37df78"
SEGMENTATIONS_URL = "https://data.caltech.edu/records/w9d68-gec53/files/segmentations.tgz"
SEGMENTATIONS_MD5 = "4d47ba1228eae64f2fa547c47bc65255"

CONTENTS = (
    "images.txt",
    "image_class_labels.txt",
    "train_test_split.txt",
    "bounding_boxes.txt",
    "classes.txt",
    "parts/parts.txt",
    "parts/part_locs.txt",
    "images",
)
"""Required entries of the data set's folder."""


@DATASETS.register("cub")
class CUB(ImageDataset):
    """CUB-200-2011 (Wah et al. 2011), or a subset of it, in the official layout.

    Images are in the order of `images.txt`. Labels count from 0 in the order of `classes.txt`, over the classes that
    have an image in at least one split. Boxes and key points come from the lists, in pixels of the image file; some
    official boxes extend beyond the image. If there is a folder `segmentations` beside `images` or in `root`, samples
    have masks: pixels that most annotators marked (grey above 127).

    Args:
        split: `train` or `test`, as in `train_test_split.txt`.
        root: the folder with `images.txt`, or its parent with the folder `CUB_200_2011`.
        classes: the classes to use, by name (`001.Black_footed_Albatross`, or without the number) or by number, as in
            `classes.txt`; all by default.
        download: whether to download the images (1.2 GB) and the masks (40 MB) into `root` if they are missing.

    Raises:
        InputError: if a list or the folder of images is missing, a line is malformed, a list lacks an image, a class is
            unknown, or a download fails.
    """

    def __init__(
        self,
        *,
        split: Literal["train", "test"],
        root: PathText,
        classes: list[Any] | None = None,
        download: bool = False,
    ) -> None:
        top = Path(root).expanduser()
        folder = top if (top / "images.txt").exists() else top / "CUB_200_2011"
        if download and not (folder / "images.txt").exists():
            download_archive(IMAGES_URL, IMAGES_MD5, folder)
        for name in CONTENTS:
            if not (folder / name).exists():
                raise InputError(
                    f"CUB-200-2011: {folder / name} is missing; {top} or its folder CUB_200_2011 must hold "
                    f"{', '.join(CONTENTS)}; download=true downloads all into a root without images.txt"
                )
        # If both official archives are unpacked in one place, the masks lie beside CUB_200_2011, not in it.
        self._masks = next((f for f in (folder / "segmentations", top / "segmentations") if f.is_dir()), None)
        if download and self._masks is None:
            self._masks = folder / "segmentations"
            download_archive(SEGMENTATIONS_URL, SEGMENTATIONS_MD5, self._masks)
        self._folder = folder
        self.mask_names = () if self._masks is None else ("bird",)

        images: dict[Any, Any] = _Table(folder / "images.txt", {"image_id": int, "path": str})
        class_ids = _Table(folder / "image_class_labels.txt", {"image_id": int, "class_id": int})
        training = _Table(folder / "train_test_split.txt", {"image_id": int, "is_training": _flag})
        boxes = _Table(
            folder / "bounding_boxes.txt",
            {"image_id": int, "x": _number, "y": _number, "width": _length, "height": _length},
        )
        class_names = _Table(folder / "classes.txt", {"class_id": int, "name": str})
        part_names = _Table(folder / "parts/parts.txt", {"part_id": int, "name": str})
        parts = _Table(
            folder / "parts/part_locs.txt",
            {"image_id": int, "part_id": int, "x": _number, "y": _number, "visible": _flag},
            keys=2,
        )

        # Both splits number the classes of both, so that a label means the same in each.
        present = {class_ids[image]: class_names[class_ids[image]] for image in images}
        if classes is not None:
            wanted = _chosen(classes, present)
            images = {image: row for image, row in images.items() if class_ids[image] in wanted}
            present = {class_id: name for class_id, name in present.items() if class_id in wanted}
        label_of = {class_id: label for label, class_id in enumerate(c for c in class_names if c in present)}
        self.classes = [printable(class_names[class_id][0]) for class_id in label_of]
        self.part_names = [name for (name,) in part_names.values()]
        chosen = [image for image in images if training[image] == (split == "train",)]
        self.labels = [label_of[class_ids[image]] for image in chosen]
        self._paths: list[str] = [images[image][0] for image in chosen]
        corners = [(x, y, x + width, y + height) for x, y, width, height in (boxes[image] for image in chosen)]
        points = torch.tensor([parts[image + part] for image in chosen for part in part_names])
        points = points.reshape(len(chosen), len(part_names), 3)
        self._boxes = torch.tensor(corners).reshape(len(chosen), 4)
        self._parts = points[..., :2]
        self._visible = points[..., 2] > 0

    def image_id(self, index: int) -> str:
        """The path of the image in `images.txt`."""
        return printable(self._paths[index])

    def files(self, index: int) -> tuple[Path, ...]:
        """The image's file and, if there are masks, the file of its mask."""
        image = self._folder / "images" / self._paths[index]
        return (image,) if self._masks is None else (image, (self._masks / self._paths[index]).with_suffix(".png"))

    def annotation(self, index: int) -> str:
        """Class name, box, key points and their visibility."""
        truth = (values[index].tolist() for values in (self._boxes, self._parts, self._visible))
        return " ".join(map(str, (self.classes[self.labels[index]], *truth)))

    def load(self, index: int) -> Sample:
        """Image `index` with its box, 15 key points, their visibility and, if there are masks, the bird's mask.

        Raises:
            InputError: if the image or its mask is missing or cannot be decoded, or their sizes differ.
        """
        image_file, *mask_files = self.files(index)
        image = decode_image(image_file, upright=False)  # boxes and key points refer to the pixels of the file
        height, width = image.shape[-2:]
        masks = None
        for path in mask_files:
            masks = tv_tensors.Mask(decode_image(path, upright=False)[:1] > 127)
            if masks.shape[-2:] != image.shape[-2:]:
                raise InputError(
                    f"mask {path} is {masks.shape[-1]}x{masks.shape[-2]} pixels, but its image is {width}x{height}"
                )
        sample = Sample(
            image=image,
            label=self.labels[index],
            index=index,
            box=tv_tensors.BoundingBoxes(
                self._boxes[index : index + 1].clone(),
                format=tv_tensors.BoundingBoxFormat.XYXY,
                canvas_size=(height, width),
            ),
            masks=masks,
            parts=tv_tensors.KeyPoints(self._parts[index].clone(), canvas_size=(height, width)),
            visible=self._visible[index],
        )
        return hide_outside(sample)


def _chosen(classes: Sequence[Any], present: Mapping[tuple[int, ...], tuple[Any, ...]]) -> set[tuple[int, ...]]:
    """The ids of classes that are given by number or name.

    Raises:
        InputError: for a class without images, a class that is given twice, and if no class is given.
    """
    named = {name: class_id for class_id, (name,) in present.items()}
    known = named | {str(class_id[0]): class_id for class_id in present}
    known |= {name.partition(".")[2]: class_id for name, class_id in named.items() if "." in name}
    found = []
    for one in classes:
        if str(one) not in known:
            raise unknown("class in data.dataset.classes:", str(one), named)
        found.append(known[str(one)])
    if not found or len(set(found)) < len(found):
        twice = [str(one) for one, class_id in zip(classes, found, strict=True) if found.count(class_id) > 1]
        raise InputError(f"data.dataset.classes must name some classes, each once; got {', '.join(twice) or 'none'}")
    return set(found)


class _Table(dict[tuple[int, ...], tuple[Any, ...]]):
    """The lines of a list file as a dict: the first `keys` columns are the ids, the others the values.

    A look-up of ids without a line raises `InputError`.
    """

    def __init__(self, path: Path, columns: Mapping[str, Callable[[str], Any]], keys: int = 1) -> None:
        super().__init__()
        self.path = path
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            words = line.strip().split(maxsplit=len(columns) - 1)  # the last column, a name, may contain blanks
            try:
                fields = [convert(word) for convert, word in zip(columns.values(), words, strict=True)]
            except ValueError:
                raise InputError(f"{path}, line {number}: expected '{' '.join(columns)}', got {line!r}") from None
            if tuple(fields[:keys]) in self:
                raise InputError(f"{path}, line {number}: a second line for {' '.join(words[:keys])}")
            self[tuple(fields[:keys])] = tuple(fields[keys:])

    def __missing__(self, ids: tuple[int, ...]) -> tuple[Any, ...]:
        raise InputError(f"{self.path} has no line for {' '.join(map(str, ids))}, which other lists name")


def _number(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(word)
    return value


def _length(word: str) -> float:
    value = _number(word)
    if value <= 0:
        raise ValueError(word)
    return value


def _flag(word: str) -> bool:
    if word not in ("0", "1"):
        raise ValueError(word)
    return word == "1"
