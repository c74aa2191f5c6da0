"""Stanford Cars: car models by make, model and year, with boxes."""

import zlib
from pathlib import Path
from typing import Literal

from torchvision.datasets import StanfordCars

from interp_models.core.errors import InputError
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, boxed_sample

FILES = (
    "devkit/cars_train_annos.mat", "devkit/cars_meta.mat", "cars_test_annos_withlabels.mat", "cars_train", "cars_test",
)  # fmt: skip
"""Required entries of `stanford_cars`."""


@DATASETS.register("cars")
class Cars(ImageDataset):
    """Stanford Cars (Krause et al. 2013): 8,144 training images, 8,041 test images, 196 classes.

    The folder has the official layout. The authors' page is gone, so this class cannot download the images. Unpack
    copies of `cars_train.tgz`, `cars_test.tgz`, `car_devkit.tgz` and `cars_test_annos_withlabels.mat` into
    `root/stanford_cars`.

    Args:
        split: `train` or `test`.
        root: the folder with `stanford_cars`.

    Raises:
        InputError: if a part of the data set is missing.
    """

    def __init__(self, *, split: Literal["train", "test"], root: PathText) -> None:
        folder = Path(root).expanduser() / "stanford_cars"
        for name in FILES:
            if not (folder / name).exists():
                raise InputError(f"Stanford Cars: {folder / name} is missing; {folder} must hold {', '.join(FILES)}")
        from scipy.io import loadmat  # type: ignore[import-untyped]  # slow to import
        from scipy.io.matlab import MatReadError  # type: ignore[import-untyped]

        try:
            reader = StanfordCars(folder.parent, split)
            rows = loadmat(reader._annotations_mat_path, squeeze_me=True)["annotations"]
            boxes = [[float(row[f"bbox_{end}"]) for end in ("x1", "y1", "x2", "y2")] for row in rows]
        except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, zlib.error, MatReadError) as error:
            raise InputError(f"Stanford Cars: the lists of {folder} cannot be read: {error}") from None
        self.classes = [name.replace("/", "-") for name in reader.classes]  # "Ram C/V Cargo Van Minivan 2012"
        self._paths = [Path(path) for path, _ in reader._samples]
        self.labels = [int(label) for _, label in reader._samples]
        # The lists count pixels from 1, and boxes include their last pixels.
        self._boxes = [(x0 - 1, y0 - 1, x1, y1) for x0, y0, x1, y1 in boxes]

    def image_id(self, index: int) -> str:
        """The path of the image in `stanford_cars`."""
        path = self._paths[index]
        return f"{path.parent.name}/{path.name}"

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
