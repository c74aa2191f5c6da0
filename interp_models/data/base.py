"""Base class of data sets, and their samples: images with optional ground truth."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import tv_tensors

from interp_models.core.errors import InputError
from interp_models.core.registry import Registry
from interp_models.core.truth import Truth
from interp_models.data.decoding import decode_image as decode_image


class Sample(NamedTuple):
    """One image with its ground truth or, after `collate`, a batch of images. Ground truth that the data set does not
    have is None. An image without an object in a data set that has boxes or masks has none of them: (0, 4), (0, H, W).

    A named tuple is a pytree: transforms v2 move boxes, masks and key points along with the image, and Lightning moves
    the sample to the device.
    """

    image: Tensor
    """(3, H, W): uint8 from a data set, float32 in [0, 1] after the transforms; in a batch (B, 3, H, W). Cached
    features (C, h, w) can replace it; see `CachedFeatures`."""
    label: Any
    """Class, an int; in a batch int64 (B,). If images have several labels: bool (K,), true for the classes of the
    image; in a batch (B, K)."""
    index: Any
    """Position in the split of the data set, an int; in a batch int64 (B,)."""
    box: Tensor | None = None
    """(M, 4): `tv_tensors.BoundingBoxes` of the image's objects, XYXY in pixels; in a batch (B, M, 4), where images
    with fewer objects are filled up with NaN."""
    masks: Tensor | None = None
    """(M, H, W): bool `tv_tensors.Mask` of the object and then of its parts or, with `mask_classes`, of the objects of
    each class; in a batch (B, M, H, W), where images with fewer masks are filled up with empty ones."""
    parts: Tensor | None = None
    """(P, 2): `tv_tensors.KeyPoints`, x and y in pixels; in a batch (B, P, 2)."""
    visible: Tensor | None = None
    """(P,): bool, whether the key point is visible and inside the image; in a batch (B, P)."""
    box_classes: Tensor | None = None
    """(M,): int64, class of each box; in a batch (B, M), -1 beyond the last box. None if all boxes are of the image's
    class."""
    mask_classes: Tensor | None = None
    """(M,): int64, class of each mask; in a batch (B, M), -1 beyond the last mask. None if masks are those of one
    object and its parts."""


class ImageDataset(ABC):
    """One split of a labelled image data set. It decodes images; the data module transforms them.

    A data set implements `image_id` and `load`, and sets `classes` and `labels`. The other members have defaults.
    """

    classes: Sequence[str]
    """Class names by label."""
    labels: Sequence[Any]
    """Label of every image; if images have several labels, a tuple with the labels of every image, maybe empty."""
    multilabel: bool = False
    """Whether images have several labels."""
    part_names: Sequence[str] = ()
    """Names of the key points, in the order of `Sample.parts`."""
    mask_names: Sequence[str] = ()
    """Names of the masks, in the order of `Sample.masks`; the first is the object."""
    validation: Sequence[int] = ()
    """Indices of the images in the split `train` that are meant for validation."""
    drawn: bool = False
    """Whether images are drawn by a program: they have no files, and `annotation` determines their content."""
    note: str = ""
    """How the split was made, if the data set has no official one; empty otherwise."""
    left_out: Mapping[str, Sequence[str]] = {}
    """Names of files and folders that are not read, by kind (such as `files that are not images`)."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image_id(self, index: int) -> str:
        """A name of the image that is the same in every run, usually its path in the data set; see `printable`."""

    def files(self, index: int) -> tuple[Path, ...]:
        """The files from which image `index` and its masks are read; () if it has none or they are unknown."""
        return ()

    def annotation(self, index: int) -> str:
        """Text with the class name of image `index`, or those of its labels, and all ground truth that is not in
        `files`.

        Digests use it, so it must change if the ground truth changes.
        """
        if self.multilabel:
            return json.dumps([str(self.classes[label]) for label in labels_of(self, index)])
        return str(self.classes[self.labels[index]])

    def target(self, index: int) -> int | Tensor:
        """The `label` of the sample of image `index`: its class, or bool (K,) if images have several labels."""
        return multi_hot(labels_of(self, index), len(self.classes)) if self.multilabel else int(self.labels[index])

    @abstractmethod
    def load(self, index: int) -> Sample:
        """Image `index` in its original size, with its ground truth.

        Raises:
            InputError: if the file is missing or cannot be decoded; the message names it.
        """


def loaded(images: ImageDataset, index: int) -> Sample:
    """Image `index` as transforms take it: they know by the type `tv_tensors.Image` what to scale to [0, 1].

    Raises:
        InputError: as `ImageDataset.load`, and unless the image is a tensor (3, H, W) of uint8 or of floats in [0, 1].
    """
    sample = images.load(index)
    image: Any = sample.image
    found = f"{tuple(image.shape)} of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
    if isinstance(image, Tensor) and image.is_floating_point():
        fits = bool(((image >= 0) & (image <= 1)).all())
        found += "" if fits else ", not all of them in [0, 1]"
    else:
        fits = isinstance(image, Tensor) and image.dtype == torch.uint8
    if not fits or image.dim() != 3 or image.shape[0] != 3:
        raise InputError(
            f"{type(images).__name__}: the image of a sample must be a tensor (3, H, W) of uint8, or of floats in "
            f"[0, 1]; got {found}, image {images.image_id(index)}"
        )
    return sample._replace(image=tv_tensors.Image(image))


def labels_of(images: ImageDataset, index: int) -> tuple[int, ...]:
    """The labels of image `index`, ascending; one if images have a single class."""
    return tuple(sorted(map(int, images.labels[index]))) if images.multilabel else (int(images.labels[index]),)


def written_label(images: ImageDataset, index: int) -> str:
    """The label or labels of image `index` as text, for digests."""
    return str(labels_of(images, index)) if images.multilabel else str(images.labels[index])


def multi_hot(labels: Iterable[int], classes: int) -> Tensor:
    """Labels as bool (K,), true at their places.

    >>> multi_hot([0, 2], 3).tolist()
    [True, False, True]
    """
    found = torch.zeros(classes, dtype=torch.bool)
    found[list(labels)] = True
    return found


DATASETS: Registry[ImageDataset] = Registry("dataset", "interp_models.data.DATASETS")


def printable(name: str) -> str:
    r"""A file name as text that can be printed and written anywhere. Different names stay different.

    A byte that is not UTF-8 (in Python a lone surrogate) becomes `\xe9`, a character that cannot be printed `\u000a`,
    and a backslash two backslashes.

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
    """Read an image file, without turning it, and add its box (XYXY in pixels); raises as `decode_image`."""
    image = decode_image(path, upright=False)  # boxes refer to the pixels of the file
    size = (image.shape[-2], image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(torch.tensor([box]), format="XYXY", canvas_size=size)
    return Sample(image=image, label=label, index=index, box=boxes)


def collate(samples: Sequence[Sample]) -> Sample:
    """Stack samples of the same size into a batch."""
    fills = {"box": torch.nan, "masks": False, "parts": 0, "visible": False, "box_classes": -1, "mask_classes": -1}
    samples = [sample._replace(visible=_visible(sample)) for sample in samples]  # what fills up `parts` is not
    truth = {name: _filled([getattr(sample, name) for sample in samples], fill) for name, fill in fills.items()}
    return Sample(
        image=_stack([sample.image for sample in samples]),
        label=default_collate([sample.label for sample in samples]),
        index=default_collate([sample.index for sample in samples]),
        **truth,
    )


def _visible(sample: Sample) -> Tensor | None:
    """Which key points of a sample are visible: all, if it does not say it."""
    if sample.parts is None or sample.visible is not None:
        return sample.visible
    return torch.ones(len(sample.parts), dtype=torch.bool)


def _filled(values: Sequence[Tensor | None], fill: float) -> Tensor | None:
    """Stack ground truth, filled up along the first axis; None if no sample has any."""
    known = [value.as_subclass(Tensor) for value in values if value is not None]
    if not known:
        return None
    longest = max(len(value) for value in known)
    dtype = torch.float32 if math.isnan(fill) and not known[0].is_floating_point() else known[0].dtype
    stacked = known[0].new_full((len(values), longest, *known[0].shape[1:]), fill, dtype=dtype)
    for row, value in zip(stacked, values, strict=True):
        if value is not None:
            row[: len(value)] = value.as_subclass(Tensor)
    return stacked


def of_each(batch: Sample, change: Callable[[Any], Any]) -> Sample:
    """Apply `change` to all values of a batch that are not None."""
    changed: list[Any] = [None if value is None else change(value) for value in batch]
    return Sample(*changed)


def rows_of(batch: Sample, rows: list[int]) -> Sample:
    """The images of a batch at the positions `rows`."""
    return of_each(batch, lambda value: value[rows])


def truth_of(batch: Sample, target: Tensor) -> Truth:
    """The ground truth of a batch for the classes to explain, (B,).

    Of the masks of a single object the first is the object's, the others are of parts.
    """
    boxes, masks, part_masks = batch.box, batch.masks, None
    if boxes is not None and batch.box_classes is not None:
        boxes = boxes.masked_fill((batch.box_classes != target[:, None])[..., None], torch.nan)
    if masks is not None and batch.mask_classes is not None:
        masks = (masks & (batch.mask_classes == target[:, None])[..., None, None]).any(dim=1)
    elif masks is not None:
        masks, part_masks = masks[:, :1].any(dim=1), masks[:, 1:] if masks.shape[1] > 1 else None
    return Truth(boxes, masks, part_masks, batch.parts, batch.visible)


def _stack(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.as_subclass(Tensor) for value in values])
