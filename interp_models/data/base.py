"""Data sets and their samples: images with optional ground truth."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import tv_tensors

from interp_models.core.registry import Registry
from interp_models.data.decoding import decode_image as decode_image


class Sample(NamedTuple):
    """One image, or after `collate` a batch of images, with its ground truth (None where there is none).

    A named tuple is a pytree: transforms v2 move boxes, masks and key points along with the image, and
    Lightning moves it to the device.
    """

    image: Tensor
    """(3, H, W): uint8 from a data set, float32 in [0, 1] after the transforms; batched (B, 3, H, W). Stored features
    (C, h, w) stand in its place; see `CachedFeatures`."""
    label: Any
    """Class, an int; batched int64 (B,)."""
    index: Any
    """Position in the data set's split, an int; batched int64 (B,)."""
    box: Tensor | None = None
    """(1, 4) `tv_tensors.BoundingBoxes`, XYXY in pixels; batched (B, 4)."""
    masks: Tensor | None = None
    """(M, H, W) bool `tv_tensors.Mask`; the first is the object, the others its parts; batched (B, M, H, W)."""
    parts: Tensor | None = None
    """(P, 2) `tv_tensors.KeyPoints`, x and y in pixels; batched (B, P, 2)."""
    visible: Tensor | None = None
    """(P,) bool: the part is visible and inside the image; batched (B, P)."""


class ImageDataset(ABC):
    """One split of a labelled image data set; it decodes, and leaves transforms to the data module."""

    classes: Sequence[str]
    """Class names, by label."""
    labels: Sequence[int]
    """Label of every image."""
    part_names: Sequence[str] = ()
    """Names of the key points, in the order of `Sample.parts`."""
    mask_names: Sequence[str] = ()
    """Names of the masks, in the order of `Sample.masks`; the first is the object."""
    validation: Sequence[int] = ()
    """Images of the split `train` that the data set itself sets aside for validation."""
    drawn: bool = False
    """Whether images have no files, and `annotation` determines their content."""
    note: str = ""
    """A note on how the split was made, if the data set has none of its own."""
    left_out: Mapping[str, Sequence[str]] = {}
    """Names of entries beside the images that are not read, by kind (`files that are no images`)."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image_id(self, index: int) -> str:
        """A name of the image that stays the same from run to run (its path in the data set), see `printable`."""

    def files(self, index: int) -> tuple[Path, ...]:
        """The files that image `index` is read from, its mask's too; () where it is drawn, or the data set does not
        say."""
        return ()

    def annotation(self, index: int) -> str:
        """Class name of image `index`, and all its ground truth that is in no file of `files`, as text that changes
        when it does."""
        return str(self.classes[self.labels[index]])

    @abstractmethod
    def load(self, index: int) -> Sample:
        """Image `index` as stored, with its ground truth.

        Raises:
            InputError: if the file is missing or cannot be decoded, naming it.
        """


DATASETS: Registry[ImageDataset] = Registry("dataset", "interp_models.data.DATASETS")


def printable(name: str) -> str:
    r"""A file's name as text that can be printed and written anywhere; no two names become one.

    A byte that is no UTF-8 (in Python a lone surrogate) becomes `\xe9`, a character that does not print `\u000a`, and
    a backslash two.

    >>> printable("caf\udce9 \n.png")
    'caf\\xe9 \\u000a.png'
    """

    def shown(character: str) -> str:
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:
            return f"\\x{code - 0xDC00:02x}"
        if character == "\\":
            return "\\\\"
        return character if character.isprintable() else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return "".join(map(shown, name))


def boxed_sample(path: Path, label: int, index: int, box: Sequence[float]) -> Sample:
    """An image file as it is stored, with its box, XYXY in its pixels; raises as `decode_image`."""
    image = decode_image(path, upright=False)  # boxes refer to stored pixels
    size = (image.shape[-2], image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(torch.tensor([box]), format="XYXY", canvas_size=size)
    return Sample(image=image, label=label, index=index, box=boxes)


def collate(samples: Sequence[Sample]) -> Sample:
    """Stack samples of one size into a batch."""
    boxes, masks, parts, visible = (
        None if getattr(samples[0], name) is None else _stack([getattr(sample, name) for sample in samples])
        for name in ("box", "masks", "parts", "visible")
    )
    return Sample(
        image=_stack([sample.image for sample in samples]),
        label=default_collate([sample.label for sample in samples]),
        index=default_collate([sample.index for sample in samples]),
        box=None if boxes is None else boxes[:, 0],
        masks=masks,
        parts=parts,
        visible=visible,
    )


def of_each(batch: Sample, change: Callable[[Any], Any]) -> Sample:
    """A batch whose values that are not None are changed."""
    changed: list[Any] = [None if value is None else change(value) for value in batch]
    return Sample(*changed)


def rows_of(batch: Sample, rows: list[int]) -> Sample:
    """Some images of a batch."""
    return of_each(batch, lambda value: value[rows])


def _stack(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.as_subclass(Tensor) for value in values])
