"""Data sets of image files in one folder per class, or named by a list."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from interp_models.core.errors import InputError
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, decode_image, printable
from interp_models.data.listing import (
    NO_IMAGES,
    SPLITS,
    Found,
    LeftOut,
    entries,
    files_of,
    joined,
    read_list,
    split_of,
    stray,
)
from interp_models.data.subsets import stratified_split

FRACTION = 0.2
"""Fraction of each class that is drawn for the test if there is no split."""
LAYOUTS = "train/<class>/*.jpg and test/<class>/*.jpg (or val instead of test), or <class>/*.jpg"


@DATASETS.register("image_folder")
class ImageFolder(ImageDataset):
    """Images in `root/train/<class>/` and `root/test/<class>/`, or in `root/<class>/`, or named by a list.

    `root/val/<class>/` has validation images; if there is no `test`, it has the test images. If neither folders nor
    list give a split, a part of each class is drawn for the test, by the names of the images. Classes are the names of
    the folders or the labels of the list, sorted. Images are sorted by class and path, or come in the order of the
    list. The class is the only ground truth. Names that begin with a dot are ignored. Images are turned upright as
    their EXIF orientation says.

    Args:
        split: `train` or `test`.
        root: the folder.
        list: a CSV file in the working folder or in `root`, with the columns `path`, `label` and optionally `split`
            (`train`, `val`, `test`). Paths are relative to `root` or to the folder of the list.
        test_fraction: fraction of each class that is drawn for the test if there is no split; 0.2 if not given.
        seed: seed of this draw.
        max_value: maximum of the range of images of more than 8 bits, see `decode_image`.

    Raises:
        InputError: if a folder or a list is missing or ambiguous, the classes of the splits differ, or a class of the
            split has no image.
    """

    def __init__(
        self,
        *,
        split: Literal["train", "test"],
        root: PathText,
        list: PathText | None = None,
        test_fraction: float | None = None,
        seed: int = 0,
        max_value: float | None = None,
    ) -> None:
        if test_fraction is not None and not 0 < test_fraction < 1:
            raise InputError(f"data.dataset.test_fraction must be above 0 and below 1; got {test_fraction}")
        if max_value is not None and not 0 < max_value < np.inf:
            raise InputError(f"data.dataset.max_value must be above 0; got {max_value}")
        top = Path(root).expanduser()
        images, classes, self.left_out = _of_folders(top, split) if list is None else _of_list(list, top)
        if not all(image.split for image in images):
            fraction = FRACTION if test_fraction is None else test_fraction
            images = _drawn(images, fraction, seed)
            self.note = f"test images are {100 * fraction:g} % of each class, drawn by seed {seed}"
        elif test_fraction is not None:
            raise InputError(
                f"data.dataset.test_fraction={test_fraction}: {list or top} already says which images are for the test"
            )
        wanted = ("train", "val") if split == "train" else ("test",)
        self._images = [image for part in wanted for image in images if image.split == part]
        self.validation = [index for index, image in enumerate(self._images) if image.split == "val"]
        self._max_value = max_value
        self.classes = [printable(name).replace("/", "-") for name in classes]  # they become file names
        if twice := [name for name in self.classes if self.classes.count(name) > 1]:
            raise InputError(f"two classes have the name {twice[0]}, as / becomes -")
        label_of = {name: label for label, name in enumerate(classes)}
        self.labels = [label_of[image.label] for image in self._images]

    def image_id(self, index: int) -> str:
        """The path of the image in `root` or in the list."""
        return printable(self._images[index].name)

    def files(self, index: int) -> tuple[Path, ...]:
        """The image's file."""
        return (self._images[index].path,)

    def annotation(self, index: int) -> str:
        """The class name, and the option `max_value` if it is given, because it changes the pixels."""
        name = super().annotation(index)
        return name if self._max_value is None else f"{name} {self._max_value}"

    def load(self, index: int) -> Sample:
        """Image `index` and its label.

        Raises:
            InputError: if the file cannot be decoded, or the range of its values is unknown.
        """
        image = decode_image(self._images[index].path, max_value=self._max_value)
        return Sample(image=image, label=self.labels[index], index=index)


class _Layout(NamedTuple):
    """Images, classes and left-out files of a folder or a list; if the folder has split folders, of one split."""

    images: list[Found]
    classes: list[str]
    left_out: LeftOut


def _of_folders(root: Path, split: str) -> _Layout:
    if root.exists() and not root.is_dir():
        raise InputError(f"image folder: {root} is a file; expected a folder that holds {LAYOUTS}")
    folders, others = _splits_in(root) if root.exists() else ({}, [])
    if not root.exists() or (folders and not {"train", "test"} <= folders.keys()):
        missing = root / ("test" if "train" in folders else "train")
        why = f"; give other names to {', '.join(map(str, folders.values()))} if they are classes" if others else ""
        raise InputError(f"image folder: {missing} is missing; expected {LAYOUTS} in {root}{why}")
    if not folders:
        classes = _classes_in(root)
        images, left_out = files_of([(root / name, name) for name in classes], root, "")
        _check_flat(root, classes)
        _check_each(images, classes, root, "", left_out)
        return _Layout(images, classes, joined(left_out, stray(root, root)))
    by_split = {key: _classes_in(folders[key]) for key in SPLITS if key in folders}
    classes = by_split["train"]
    for key, own in by_split.items():
        if differing := sorted((set(classes) ^ set(own)) if key == "test" else (set(own) - set(classes))):
            names = ", ".join(map(printable, differing))
            raise InputError(f"{folders['train']} and {folders[key]} must hold the same classes; only one has {names}")
    images, left_out = [], {"folders that are no split": others} if others else {}
    for key in ("train", "val") if split == "train" else ("test",):
        if key in folders:
            found, rest = files_of([(folders[key] / name, name) for name in by_split[key]], root, key)
            if key != "val":
                _check_each(found, classes, root, f"{key} ", rest)
            images += found
            left_out = joined(left_out, rest, stray(folders[key], root))
            if key == "val" and not found:
                raise InputError(f"image folder: {folders[key]} holds no image; fill it, or remove it")
    return _Layout(images, classes, left_out)


def _splits_in(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The split folders, with `val` as `test` if there is no `test`, and the names of all other folders."""
    folders: dict[str, Path] = {}
    others = []
    for name in entries(root)[0]:
        split = split_of(name)
        if split in folders:
            raise InputError(f"image folder: {folders[split]} and {root / name} are both for {split}; keep one")
        if split is None:
            others.append(printable(name))
        else:
            folders[split] = root / name
    if "test" not in folders and "val" in folders:
        folders["test"] = folders.pop("val")
    return folders, others


def _classes_in(folder: Path) -> list[str]:
    classes, _ = entries(folder)
    if not classes:
        raise InputError(f"image folder: could not find any class folder in {folder}; expected {LAYOUTS}")
    return classes


def _check_flat(root: Path, classes: Sequence[str]) -> None:
    """Raise `InputError` if class folders contain the same subfolders: they are probably splits with unknown names."""
    seen: dict[str, str] = {}
    for name in classes:
        for inner in entries(root / name)[0]:
            if inner in seen:
                raise InputError(
                    f"image folder: {root / seen[inner]} and {root / name} both hold {printable(inner)}; if they are "
                    f"splits, name them {', '.join(SPLITS)}, and if they are classes, give a list of the images"
                )
            seen[inner] = name


def _check_each(images: Sequence[Found], classes: Sequence[str], root: Path, split: str, left_out: LeftOut) -> None:
    """Raise `InputError` if a class has no image."""
    if without := sorted(set(classes) - {image.label for image in images}):
        names = ", ".join(map(printable, without))
        other = left_out.get(NO_IMAGES, [])
        rest = f"; {len(other)} files are no images, such as {other[0]}" if other else ""
        raise InputError(f"image folder {root}, {split}images: found none of the classes {names}{rest}")


def _of_list(name: str, root: Path) -> _Layout:
    file = Path(name).expanduser()
    if not file.exists() and (root / file).exists():
        file = root / file
    images = read_list(file, root)
    splits = {image.split for image in images}
    if splits != {""}:
        if "test" not in splits:
            images = [image._replace(split={"val": "test"}.get(image.split, image.split)) for image in images]
        if missing := {"train", "test"} - {image.split for image in images}:
            raise InputError(f"list {file}: no image is of split {sorted(missing)[0]}")
    return _Layout(images, sorted({image.label for image in images}), {})


def _drawn(images: Sequence[Found], fraction: float, seed: int) -> list[Found]:
    """Assign each image to `train` or `test`. The draw uses names, so that additional images change little."""
    labels = np.unique([image.label for image in images], return_inverse=True)[1]
    keys = np.asarray([zlib.crc32(image.name.encode("utf-8", "surrogateescape")) for image in images], dtype=np.int64)
    _, test = stratified_split(labels, np.arange(len(images)), fraction, seed, keys)
    chosen = set(test.tolist())
    return [image._replace(split="test" if i in chosen else "train") for i, image in enumerate(images)]
