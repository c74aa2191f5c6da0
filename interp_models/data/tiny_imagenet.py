"""Tiny ImageNet: 200 classes of small images, with boxes."""

from pathlib import Path
from typing import Literal

from interp_models.core.errors import InputError
from interp_models.core.written import PathText
from interp_models.data.base import DATASETS, ImageDataset, Sample, boxed_sample
from interp_models.data.download import download_archive
from interp_models.data.voc_xml import Box

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@DATASETS.register("tiny_imagenet")
class TinyImageNet(ImageDataset):
    """Tiny ImageNet (CS231N 2015): 100,000 training images and 10,000 test images (its `val`) of 64 × 64 pixels.

    The folder has the official layout. The annotations of its test images are not public.

    Args:
        split: `train` or `test`.
        root: the folder with `tiny-imagenet-200`.
        download: whether to download the images (0.25 GB) into `root` if they are missing.

    Raises:
        InputError: if a part of the data set is missing or malformed, or a download fails.
    """

    def __init__(self, *, split: Literal["train", "test"], root: PathText, download: bool = False) -> None:
        top = Path(root).expanduser()
        self._folder = top / "tiny-imagenet-200"
        if download and not self._folder.exists():
            download_archive(URL, MD5, self._folder)
        try:
            ids = (self._folder / "wnids.txt").read_text().split()
            words = dict(line.split("\t", 1) for line in (self._folder / "words.txt").read_text().splitlines())
            rows = self._train(ids) if split == "train" else self._val()
        except OSError as error:
            parts = "tiny-imagenet-200 with wnids.txt, words.txt, train and val"
            raise InputError(f"Tiny ImageNet: {error.filename} cannot be read; {top} must hold {parts}") from None
        except ValueError as error:
            raise InputError(f"Tiny ImageNet: a list of {self._folder} cannot be read: {error}") from None
        ids.sort()
        if wrong := [label for _, label, _ in rows if label not in words or label not in ids]:
            raise InputError(f"Tiny ImageNet: the class {wrong[0]} of an image is not in wnids.txt and words.txt")
        self.classes = [words[one] for one in ids]
        self._names = [name for name, _, _ in rows]
        self.labels = [ids.index(label) for _, label, _ in rows]
        self._boxes = [box for _, _, box in rows]

    def _train(self, ids: list[str]) -> list[tuple[str, str, Box]]:
        found = []
        for one in sorted(ids):
            for line in (self._folder / "train" / one / f"{one}_boxes.txt").read_text().splitlines():
                name, *edges = line.split()
                found.append((f"train/{one}/images/{name}", one, _box(edges)))
        return found

    def _val(self) -> list[tuple[str, str, Box]]:
        lines = (self._folder / "val" / "val_annotations.txt").read_text().splitlines()
        rows = [line.split() for line in lines if line.strip()]
        return [(f"val/images/{name}", label, _box(edges)) for name, label, *edges in rows]

    def image_id(self, index: int) -> str:
        """The path of the image."""
        return self._names[index]

    def files(self, index: int) -> tuple[Path, ...]:
        """The image's file."""
        return (self._folder / self._names[index],)

    def annotation(self, index: int) -> str:
        """Class name and box."""
        return f"{self.classes[self.labels[index]]} {self._boxes[index]}"

    def load(self, index: int) -> Sample:
        """Image `index` with its label and its box.

        Raises:
            InputError: if the file is missing or cannot be decoded.
        """
        return boxed_sample(self.files(index)[0], self.labels[index], index, self._boxes[index])


def _box(edges: list[str]) -> Box:
    """A box from the edges of a list, which count pixels from 0 and include the last ones."""
    left, top, right, bottom = map(float, edges)
    return left, top, right + 1, bottom + 1
