"""CIFAR-10 and MNIST: small images that torchvision reads from files of many."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torchvision import datasets

from interp_models.core.errors import InputError, first_line
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample


class Small(ImageDataset):
    """Abstract: a data set that torchvision reads as one array of images.

    Args:
        split: `train` or `test`.
        root: torchvision's folder of the data set.
        download: whether to download the images into `root` if they are missing.

    Raises:
        InputError: if the data set is missing or broken, or a download fails.
    """

    reader: ClassVar[Any]
    """Class of torchvision."""
    layout: ClassVar[str]
    """What the folder must hold."""

    def __init__(self, *, split: Literal["train", "test"], root: PathText, download: bool = False) -> None:
        top = Path(root).expanduser()
        try:
            found = self.reader(top, train=split == "train", download=download)
        except Exception as error:  # torchvision raises many kinds for missing and broken files
            raise InputError(
                f"{self.reader.__name__}: {top} must hold {self.layout}; download=true fetches it: {first_line(error)}"
            ) from None
        self.classes = [str(name) for name in found.classes]
        self.labels = [int(label) for label in found.targets]
        images = torch.as_tensor(np.asarray(found.data))
        self._images = images.permute(0, 3, 1, 2) if images.dim() == 4 else images[:, None].expand(-1, 3, -1, -1)
        self._split = split

    def image_id(self, index: int) -> str:
        """Split and number of the image."""
        return f"{self._split}/{index:05d}"

    def load(self, index: int) -> Sample:
        """Image `index` and its label; a grey image has three equal channels."""
        return Sample(self._images[index].contiguous(), self.labels[index], index)


@DATASETS.register("cifar10")
class CIFAR10(Small):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training images and 10,000 test images of 32 × 32 pixels, 10 classes.

    Args:
        split: `train` or `test`.
        root: the folder with `cifar-10-batches-py`.
        download: whether to download the images (0.17 GB) into `root` if they are missing.

    Raises:
        InputError: if the data set is missing or broken, or a download fails.
    """

    reader, layout = datasets.CIFAR10, "cifar-10-batches-py"


@DATASETS.register("mnist")
class MNIST(Small):
    """MNIST (LeCun et al. 1998): 60,000 training images and 10,000 test images of 28 × 28 grey pixels, 10 digits.

    Args:
        split: `train` or `test`.
        root: the folder with `MNIST/raw`.
        download: whether to download the images (11 MB) into `root` if they are missing.

    Raises:
        InputError: if the data set is missing or broken, or a download fails.
    """

    reader, layout = datasets.MNIST, "MNIST/raw"
