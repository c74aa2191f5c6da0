"""MIT Indoor: 67 classes of indoor scenes."""

from pathlib import Path
from typing import Literal

from interp_models.core.errors import InputError
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, decode_image, printable

LISTS = {"train": "TrainImages.txt", "test": "TestImages.txt"}


@DATASETS.register("mit67")
class MIT67(ImageDataset):
    """MIT Indoor (Quattoni and Torralba, CVPR 2009): per class 80 training images and about 20 test images.

    The folder has the official layout. The class is the only ground truth.

    Args:
        split: `train` or `test`.
        root: the folder with `Images`, `TrainImages.txt` and `TestImages.txt`. They come from the authors' archive
            `indoorCVPR_09.tar` and the two lists on their page, web.mit.edu/torralba/www/indoor.html.

    Raises:
        InputError: if a list or the images are missing, or a line of a list is malformed.
    """

    def __init__(self, *, split: Literal["train", "test"], root: PathText) -> None:
        folder = Path(root).expanduser()
        for name in ("Images", *LISTS.values()):
            if not (folder / name).exists():
                raise InputError(
                    f"MIT Indoor: {folder / name} is missing; expected Images, {', '.join(LISTS.values())}"
                )
        try:
            text = {key: (folder / file).read_text("utf-8", "surrogateescape") for key, file in LISTS.items()}
        except OSError as error:
            raise InputError(f"MIT Indoor: the lists of {folder} cannot be read: {error}") from None
        names = {key: [line.strip() for line in lines.splitlines() if line.strip()] for key, lines in text.items()}
        for key, of_split in names.items():
            if wrong := [name for name in of_split if name.count("/") != 1]:
                raise InputError(f"MIT Indoor: {folder / LISTS[key]} names {wrong[0]!r}; expected <class>/<image>")
        classes = sorted({name.split("/")[0] for of_split in names.values() for name in of_split})
        self.classes = [printable(name) for name in classes]
        self._folder, self._names = folder / "Images", names[split]
        label_of = {name: label for label, name in enumerate(classes)}
        self.labels = [label_of[name.split("/")[0]] for name in self._names]

    def image_id(self, index: int) -> str:
        """The path of the image in the list."""
        return printable(self._names[index])

    def files(self, index: int) -> tuple[Path, ...]:
        """The image's file."""
        return (self._folder / self._names[index],)

    def load(self, index: int) -> Sample:
        """Image `index` and its label.

        Raises:
            InputError: if the file is missing or cannot be decoded.
        """
        image = decode_image(self._folder / self._names[index])
        return Sample(image=image, label=self.labels[index], index=index)
