"""Any data set of image files in a folder per class."""

from pathlib import Path
from typing import Literal

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from interp_models.data.base import DATASETS, ImageDataset, Sample, decode_image
from interp_models.errors import InputError
from interp_models.written import PathText


@DATASETS.register("image_folder")
class ImageFolder(ImageDataset):
    """Images in `root/train/<class>/` and `root/test/<class>/` (or `root/val/<class>/` if there is no `test`).

    Classes are the folders' names, sorted; images come by class, then by path. There is no ground truth but the class.

    Args:
        split: `train` or `test`.
        root: the folder that holds `train` and `test`.

    Raises:
        InputError: if a split's folder is missing, the splits' classes differ, or a class of the split has no image.
    """

    def __init__(self, *, split: Literal["train", "test"], root: PathText) -> None:
        self._root = Path(root).expanduser()
        train, test = self._root / "train", self._root / "test"
        if not test.is_dir() and (self._root / "val").is_dir():
            test = self._root / "val"
        for folder in (train, test):
            if not folder.is_dir():
                raise InputError(
                    f"image folder: {folder} is missing; expected train/<class>/*.jpg and test/<class>/*.jpg "
                    f"(or val instead of test) in {self._root}"
                )
        try:
            self.classes, label_of = find_classes(train)
            test_classes, _ = find_classes(test)
            if differing := sorted(set(self.classes) ^ set(test_classes)):
                raise InputError(f"{train} and {test} must hold the same classes; only one has {', '.join(differing)}")
            images = make_dataset(train if split == "train" else test, label_of, IMG_EXTENSIONS)
        except FileNotFoundError as error:  # no class, or a class without an image
            raise InputError(f"image folder {self._root}, {split} images: {error}") from None
        self._paths = [Path(path) for path, _ in images]
        self.labels = [label for _, label in images]

    def image_id(self, index: int) -> str:
        """The image's path from `root`."""
        return self._paths[index].relative_to(self._root).as_posix()

    def load(self, index: int) -> Sample:
        """Image `index` and its label.

        Raises:
            InputError: if the file cannot be decoded.
        """
        return Sample(image=decode_image(self._paths[index]), label=self.labels[index], index=index)
