"""The images to judge on, from tensors, data loaders, data sets or folders."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from interp_models.core.errors import InputError
from interp_models.core.inputs import check_images
from interp_models.data.base import ImageDataset, Sample, collate, loaded, rows_of
from interp_models.data.checks import check_labels, refuse, unusable
from interp_models.data.decoding import ADVICE
from interp_models.data.subsets import spread, subsample
from interp_models.evaluation.labels import check_several, one_label_each, several_labels, whole_numbers

IMAGE_KEYS, LABEL_KEYS = ("image", "images", "pixel_values", "x"), ("label", "labels", "target", "targets", "y")
"""Keys of images and labels in batches that are dicts."""
EXPECTED = "images: expected float images (C, H, W) in [0, 1], all of one size"
RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Samplers whose order changes from pass to pass."""


class Images:
    """Batches of images in [0, 1] with labels, in a fixed order. The label -1 means unknown; several labels of each
    image are bool (B, K).

    Args:
        loader: iterates over the batches.
        order: index of the image at each position of the loader; None numbers images as they come.
        total: number of images of all ranks, if the loader already gives each rank its own images; otherwise None.
        name: name of the data set, for the page.
        classes: names of the classes, if known.
        names: maps an index to the name of the image; None takes the index itself.
        from_files: whether images come from files that this package resizes and crops.
        labels: the labels of all images by index, if they are known without reading images.
        check: raises `InputError` if one of the images of these indices cannot be read.
        double: whether the model takes images in float64; otherwise they become float32.
        listed: whether several labels were given as lists of classes, so that K is their highest class + 1.
    """

    def __init__(
        self,
        loader: Any,
        order: Sequence[int] | None,
        *,
        total: int | None = None,
        name: str = "images",
        classes: Sequence[str] = (),
        names: Any = None,
        from_files: bool = False,
        labels: Tensor | None = None,
        check: Callable[[Iterable[int]], None] | None = None,
        double: bool = False,
        listed: bool = False,
    ) -> None:
        self.listed = listed
        self.loader, self.order, self.shared = loader, order, total is not None
        self.labels, self._check, self._double = labels, check, double
        self._all = order if total is None else range(total)
        self._ahead: Iterator[Sample] | None = None
        self.name, self.classes, self.from_files = name, tuple(classes), from_files
        self._names = names
        self._wanted: set[int] | None = None
        self.batch_size = int(getattr(loader, "batch_size", None) or 1)

    @property
    def count(self) -> int | None:
        """Number of images of all ranks; None if the loader does not tell."""
        if self._wanted is not None:
            return len(self._wanted)
        return None if self._all is None else len(self._all)

    def image_id(self, index: int) -> str:
        """The name of an image."""
        return str(index) if self._names is None else str(self._names(index))

    def drawn(self, n: int | None, seed: int) -> "Images":
        """Limit the images to `n`, drawn by `seed`; None keeps all. Returns itself.

        Raises:
            InputError: if `n` is given and the number of images is unknown, and for files that cannot be read.
        """
        if n is not None:
            if self._all is None:
                raise InputError("n_images: the loader does not say how many images it has; pass a loader with fewer")
            self._wanted = set(subsample(np.sort(np.asarray(self._all)), n, seed).tolist())
        if self._check is not None and self._all is not None:
            self._check(self._all if self._wanted is None else sorted(self._wanted))
        return self

    def shown(self, n: int) -> set[int] | None:
        """At most `n` evenly spread indices of images to draw; None if the number of images is unknown."""
        if self._all is None:
            return None
        indices = sorted(self._wanted if self._wanted is not None else self._all)
        return {indices[place] for place in spread(len(indices), n)}

    def first(self) -> Sample | None:
        """The first batch, before the draw of `drawn`; None if there is none. The next pass still begins with it."""
        batches = self._from_start()
        sample = next(batches, None)
        self._ahead = batches if sample is None else chain([sample], batches)
        return sample

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Sample]:
        """The batches of one rank, in order.

        Raises:
            InputError: for batches without images, and for images of different sizes.
        """
        for number, sample in enumerate(self._from_start()):
            if not self.shared and number % ranks != rank:
                continue
            if self._wanted is not None:
                rows = [row for row, one in enumerate(sample.index.tolist()) if one in self._wanted]
                if not rows:
                    continue
                sample = rows_of(sample, rows)
            yield sample

    def _from_start(self) -> Iterator[Sample]:
        """All batches; the first one may have been read already."""
        batches, self._ahead = self._numbered() if self._ahead is None else self._ahead, None
        return batches

    def _numbered(self) -> Iterator[Sample]:
        """All batches of the loader, with the indices of their images."""
        first, shape, columns = 0, None, None
        for batch in _read(self.loader):
            sample = as_sample(batch)
            check_images(sample.image, "images")
            if sample.image.dtype == torch.float64 and not self._double:
                sample = sample._replace(image=sample.image.float())
            own, size = tuple(sample.image.shape[1:]), len(sample.image)
            shape = shape or own
            if own != shape:
                raise InputError(f"{EXPECTED}; the first image is {shape}, image {first} is {own}")
            several = tuple(sample.label.shape[1:])
            columns = several if columns is None else columns
            if several != columns:
                found = f"those of the first image are {columns}, of image {first} {several}"
                raise InputError(f"labels: expected the same shape for every image; {found}")
            if self.order is None:
                index = torch.arange(first, first + size)
            else:
                index = torch.as_tensor(list(self.order[first : first + size]), dtype=torch.int64)
            first += size
            yield sample._replace(index=index)

    def digest(self) -> str:
        """Digest of all pixels, labels, indices, names and ground truth, in order.

        Raises:
            InputError: if the images can be read only once.
        """
        found = hashlib.sha256(json.dumps([str(name) for name in self.classes]).encode())
        for sample in self.batches():
            names = [self.image_id(index) for index in sample.index.tolist()]
            found.update(json.dumps([str(sample.image.dtype), list(sample.image.shape), names]).encode())
            for name, value in sample._asdict().items():
                if value is not None:
                    found.update(f"{name} {tuple(value.shape)}".encode())
                    found.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        if self.order is None and self.first() is None:
            raise InputError("images: with folder=, images are read twice, and these can be read only once")
        return found.hexdigest()[:16]


def _read(loader: Any) -> Iterator[Any]:
    """The batches of a loader; torch's errors on items that make no batch become an `InputError`."""
    try:
        yield from loader
    except (TypeError, RuntimeError) as error:
        if "default_collate" not in str(error) and "stack expects each tensor" not in str(error):
            raise
        raise InputError(f"{EXPECTED}; got items that make no batch: {str(error).strip().splitlines()[-1]}") from None


def images_of(
    images: Any,
    model: nn.Module,
    *,
    labels: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    image_size: int | None = None,
    batch_size: int = 16,
) -> Images:
    """The images of a tensor, a DataLoader, a data set or a folder of image files; see `judge` for the arguments.

    Raises:
        InputError: for any other type, and for labels that do not fit.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    if image_size is not None:
        if type(image_size) is not int or image_size < 1:
            raise InputError(f"image_size must be a whole number of pixels, at least 1; got {image_size!r}")
        if not isinstance(images, str | Path | ImageDataset):
            raise InputError("image_size= is for a folder of image files; resize other images before")
    double = next((x.dtype for x in model.parameters() if x.is_floating_point()), None) == torch.float64
    if isinstance(images, Tensor):
        return _of_tensor(images, labels, batch_size, double)
    if labels is not None:
        raise InputError("labels= is for a tensor of images; a data set or loader has its own labels")
    if isinstance(images, DataLoader):
        return _of_loader(images, double)
    if isinstance(images, str | Path):
        from interp_models.data.image_files import ImageFiles

        images = ImageFiles(split="test", root=str(images))
    if isinstance(images, ImageDataset):
        return _of_dataset(images, model, image_size, batch_size)
    sized = hasattr(images, "__getitem__") and hasattr(images, "__len__") and not isinstance(images, Mapping)
    if sized or isinstance(images, Dataset):
        if isinstance(images, IterableDataset):
            return _of_loader(DataLoader(images, batch_size=batch_size, collate_fn=_collated), double)
        if not sized:
            raise InputError(f"images: a data set needs __len__ and __getitem__; {type(images).__name__} lacks one")
        classes = getattr(images, "classes", ())
        loader: Any = DataLoader(images, batch_size=batch_size, collate_fn=_collated)
        known = (
            whole_numbers(images.tensors[1]) if isinstance(images, TensorDataset) and len(images.tensors) > 1 else None
        )
        name = type(images).__name__
        return Images(loader, range(len(images)), name=name, classes=classes, labels=known, double=double)
    raise InputError(
        "images must be a tensor (N, C, H, W), a DataLoader, a data set, or a folder of image files; got "
        f"{type(images).__name__}"
    )


def _of_tensor(images: Tensor, labels: Any, batch_size: int, double: bool) -> Images:
    check_images(images, "images")
    several = several_labels(labels, len(images))
    listed = several is not None and getattr(labels, "dtype", None) not in (torch.bool, np.bool_)
    known = one_label_each(labels, len(images)) if several is None else several
    loader: Any = DataLoader(TensorDataset(images, known.to(images.device)), batch_size=batch_size)
    return Images(loader, range(len(images)), name="tensor", labels=known, double=double, listed=listed)


def _of_loader(loader: DataLoader[Any], double: bool) -> Images:
    name = type(loader.dataset).__name__
    classes = getattr(loader.dataset, "classes", ())
    batches: Any = loader.batch_sampler
    sampler: Any = getattr(batches, "sampler", loader.sampler)
    if isinstance(sampler, RANDOM) or isinstance(batches, RANDOM):
        raise InputError("images: the loader shuffles, so images cannot be numbered; pass a loader with shuffle=False")
    if getattr(batches, "drop_last", False) and (
        isinstance(loader.dataset, IterableDataset) or len(sampler) % batches.batch_size
    ):
        raise InputError("images: the loader leaves out images of the last batch; pass a loader with drop_last=False")
    is_plain = type(batches) is BatchSampler
    if isinstance(sampler, DistributedSampler):
        total = len(loader.dataset)  # type: ignore[arg-type]  # such a sampler asks for its length too
        if sampler.drop_last and total % sampler.num_replicas:
            raise InputError("images: the sampler leaves out the last images; pass a sampler with drop_last=False")
        if not is_plain or type(sampler) is not DistributedSampler:
            raise InputError("images: a DistributedSampler works only with torch's BatchSampler, and not as a subclass")
        return Images(loader, list(sampler), total=total, name=name, classes=classes, double=double)
    order = list(sampler) if is_plain and type(sampler) is SequentialSampler else None
    return Images(loader, order, name=name, classes=classes, double=double)


def _of_dataset(images: ImageDataset, model: nn.Module, image_size: int | None, batch_size: int) -> Images:
    from interp_models.data.transforms import transform_of
    from interp_models.evaluation.normalisation import data_config

    about = data_config(model)
    size = image_size if image_size is not None else int(about["input_size"][-1])
    options = {key: about[key] for key in ("crop_pct", "interpolation", "crop_mode")}
    transform = transform_of({"name": "shorter_side", **options}, size).evaluation()
    loader: Any = DataLoader(_Prepared(images, transform), batch_size=batch_size, collate_fn=collate)
    return Images(
        loader,
        range(len(images)),
        name=type(images).__name__,
        classes=images.classes,
        names=images.image_id,
        from_files=True,
        labels=_labels(images),
        check=lambda indices: refuse([_advised(why) for why in unusable(images, indices, decode=False).values()]),
    )


def _labels(images: ImageDataset) -> Tensor:
    """The labels of all images: (N,) or, of several, bool (N, K)."""
    if not images.multilabel:
        return torch.as_tensor(images.labels)
    check_labels(images, f"{type(images).__name__}, image")
    return torch.stack([torch.as_tensor(images.target(index)) for index in range(len(images))])


def _advised(reason: str) -> str:
    """The reason with advice that applies here: `judge` has no option to skip files.

    >>> _advised("a.png is broken")
    'a.png is broken; mend the file or take it out of the folder'
    """
    return f"{reason.removesuffix(f'; {ADVICE}')}; mend the file or take it out of the folder"


class _Prepared(Dataset[Sample]):
    """A data set of this package with a transform."""

    def __init__(self, images: ImageDataset, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.transform(loaded(self.images, index))
        return sample


def _collated(items: Sequence[Any]) -> Any:
    if isinstance(items[0], Sample):
        return collate(items)
    image = items[0][0] if isinstance(items[0], tuple | list) and items[0] else items[0]
    if not isinstance(image, Tensor | np.ndarray | Mapping):
        hint = "; a transform such as torchvision.transforms.ToTensor makes them" if hasattr(image, "getbands") else ""
        raise InputError(f"{EXPECTED}; got {type(image).__name__}{hint}")
    return torch.utils.data.default_collate(list(items))


def as_sample(batch: Any) -> Sample:
    """Convert a batch to a `Sample`; unknown labels become -1. Labels bool (B, K) are several labels of each image.

    Args:
        batch: a `Sample`, a tensor of images, a pair of images and labels, or a dict.

    Raises:
        InputError: if the batch has no images, or labels (B, K) that are not bool.
    """
    if isinstance(batch, Sample):
        check_several(batch.label)
        return batch
    label: Any = None
    if isinstance(batch, Mapping):
        image = next((batch[key] for key in IMAGE_KEYS if key in batch), None)
        label = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and batch:
        image, label = batch[0], batch[1] if len(batch) > 1 else None
    else:
        image = batch
    if not isinstance(image, Tensor) or image.dim() != 4:
        found = tuple(image.shape) if isinstance(image, Tensor) else type(batch).__name__
        raise InputError(
            "images: expected batches of images (B, C, H, W), pairs of images and labels, or dicts with "
            f"{' or '.join(map(repr, IMAGE_KEYS))}; got {found}"
        )
    check_several(label)
    known = torch.full((len(image),), -1)
    if isinstance(label, Tensor) and label.dtype == torch.bool and label.dim() == 2 and len(label) == len(image):
        known = label
    elif isinstance(label, Tensor) and label.shape == (len(image),) and not label.is_floating_point():
        known = label.long()
    return Sample(image, known, torch.arange(len(image)))
