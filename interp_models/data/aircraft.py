"""FGVC-Aircraft: variants, families or manufacturers of aircraft, with boxes."""

from pathlib import Path
from typing import Literal

from torchvision.datasets import FGVCAircraft

from interp_models.core.errors import InputError, first_line
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, boxed_sample, printable
from interp_models.data.download import download_archive

URL = FGVCAircraft._URL


@DATASETS.register("aircraft")
class Aircraft(ImageDataset):
    """FGVC-Aircraft (Maji et al. 2013): 6,667 training images (its `trainval`) and 3,333 test images.

    The folder has the official layout. Boxes come from `images_box.txt`, in pixels of the image file. The banner with
    the author's name at the bottom of every image is kept, as in published work.

    Args:
        split: `train` or `test`.
        root: the folder with `fgvc-aircraft-2013b`.
        level: kind of class: 100 variants, 70 families or 30 manufacturers.
        download: whether to download the images (2.75 GB) into `root` if they are missing.

    Raises:
        InputError: if the data set or one of its lists is missing, or a download fails.
    """

    def __init__(
        self,
        *,
        split: Literal["train", "test"],
        root: PathText,
        level: Literal["variant", "family", "manufacturer"] = "variant",
        download: bool = False,
    ) -> None:
        top = Path(root).expanduser()
        official = {"train": "trainval", "test": "test"}[split]
        if download and not (top / "fgvc-aircraft-2013b").exists():
            download_archive(URL, None, top / "fgvc-aircraft-2013b")
        try:
            reader = FGVCAircraft(top, official, level)
            boxes = dict(_boxes(top / "fgvc-aircraft-2013b" / "data" / "images_box.txt"))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"FGVC-Aircraft: {top} must hold fgvc-aircraft-2013b/data with images, images_box.txt and the lists of "
                f"variants, families and manufacturers, as in {URL}: {first_line(error)}"
            ) from None
        self.classes = [name.replace("/", "-") for name in reader.classes]
        self._paths = [Path(path) for path in reader._image_files]
        self.labels = list(reader._labels)
        if missing := [path.stem for path in self._paths if path.stem not in boxes]:
            raise InputError(f"FGVC-Aircraft: images_box.txt has no line for image {missing[0]}")
        self._boxes = [boxes[path.stem] for path in self._paths]

    def image_id(self, index: int) -> str:
        """The file name of the image."""
        return printable(self._paths[index].name)

    def files(self, index: int) -> tuple[Path, ...]:
        """The image's file."""
        return (self._paths[index],)

    def annotation(self, index: int) -> str:
        """Class name and box."""
        return f"{self.classes[self.labels[index]]} {self._boxes[index]}"

    def load(self, index: int) -> Sample:
        """Image `index` with its label and its box.

        Raises:
            InputError: if the file cannot be decoded.
        """
        return boxed_sample(self._paths[index], self.labels[index], index, self._boxes[index])


def _boxes(path: Path) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Name and box of every line. The list counts pixels from 1, and boxes include their last pixels."""
    found = []
    for line in filter(str.strip, path.read_text().splitlines()):
        name, x0, y0, x1, y1 = line.split()
        found.append((name, (float(x0) - 1, float(y0) - 1, float(x1), float(y1))))
    return found
