"""Image files without labels."""

from pathlib import Path
from typing import Literal

import numpy as np

from interp_models.core.errors import InputError
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, decode_image, printable
from interp_models.data.listing import files_of


@DATASETS.register("image_files")
class ImageFiles(ImageDataset):
    """All images below a folder, without classes, for evaluations with `target: prediction`.

    Images are sorted by path, and every label is -1. Names that begin with a dot are ignored. Images are turned upright
    as their EXIF orientation says. The training and test splits are the same, so no model can be trained on it.

    Args:
        split: `train` or `test`.
        root: the folder.
        max_value: maximum of the range of images of more than 8 bits, see `decode_image`.
    """

    def __init__(self, *, split: Literal["train", "test"], root: PathText, max_value: float | None = None) -> None:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise InputError(f"image files: {folder} is not a folder")
        if max_value is not None and not 0 < max_value < np.inf:
            raise InputError(f"data.dataset.max_value must be above 0; got {max_value}")
        found, self.left_out = files_of([(folder, "")], folder, "")
        if not found:
            raise InputError(f"image files: {folder} holds no image")
        self._found, self._max_value = found, max_value
        self.classes: list[str] = []
        self.labels = [-1] * len(found)

    def image_id(self, index: int) -> str:
        """The path of the image in `root`."""
        return printable(self._found[index].name)

    def files(self, index: int) -> tuple[Path, ...]:
        """The image's file."""
        return (self._found[index].path,)

    def annotation(self, index: int) -> str:
        """The option `max_value` if it is given, because it changes the pixels."""
        return "" if self._max_value is None else str(self._max_value)

    def load(self, index: int) -> Sample:
        """Image `index`, with the label -1.

        Raises:
            InputError: if the file cannot be decoded, or the range of its values is unknown.
        """
        return Sample(decode_image(self._found[index].path, max_value=self._max_value), -1, index)
