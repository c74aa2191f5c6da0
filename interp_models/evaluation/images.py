"""The images to judge on, from tensors, data loaders, data sets or folders."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from interp_models.core.errors import InputError
from interp_models.data.base import ImageDataset, Sample, collate, rows_of
from interp_models.data.subsets import spread, subsample

IMAGE_KEYS, LABEL_KEYS = ("image", "images", "pixel_values", "x"), ("label", "labels", "target", "targets", "y")
"""Keys of images and labels in batches that are dicts."""


class Images:
    """Batches of images in [0, 1] with labels, in a fixed order. The label -1 means unknown.

    Args:
        loader: iterates over the batches.
        order: index of the image at each position of the loader; None numbers images as they come.
        shared: whether the loader already gives each rank its own images.
        name: name of the data set, for the page.
        classes: names of the classes, if known.
        names: maps an index to the name of the image; None takes the index itself.
        from_files: whether images come from files that this package resizes and crops.
    """

    def __init__(
        self,
        loader: Any,
        order: Sequence[int] | None,
        *,
        shared: bool = False,
        name: str = "images",
        classes: Sequence[str] = (),
        names: Any = None,
        from_files: bool = False,
    ) -> None:
        self.loader, self.order, self.shared = loader, order, shared
        self.name, self.classes, self.from_files = name, tuple(classes), from_files
        self._names = names
        self._wanted: set[int] | None = None
        self.batch_size = int(getattr(loader, "batch_size", None) or 1)

    @property
    def count(self) -> int | None:
        """Number of images of all ranks; None if the loader does not tell."""
        if self._wanted is not None:
            return len(self._wanted)
        return None if self.order is None else len(self.order)

    def image_id(self, index: int) -> str:
        """The name of an image."""
        return str(index) if self._names is None else str(self._names(index))

    def drawn(self, n: int | None, seed: int) -> "Images":
        """Limit the images to `n`, drawn by `seed`; None keeps all. Returns itself.

        Raises:
            InputError: if `n` is given and the number of images is unknown.
        """
        if n is not None:
            if self.order is None:
                raise InputError("n_images: the loader does not say how many images it has; pass a loader with fewer")
            self._wanted = set(subsample(np.sort(np.asarray(self.order)), n, seed).tolist())
        return self

    def shown(self, n: int) -> set[int] | None:
        """At most `n` evenly spread indices of images to draw; None if the number of images is unknown."""
        if self.order is None:
            return None
        indices = sorted(self._wanted if self._wanted is not None else self.order)
        return {indices[place] for place in spread(len(indices), n)}

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Sample]:
        """The batches of one rank, in order.

        Raises:
            InputError: for batches without images.
        """
        first = 0
        for number, batch in enumerate(self.loader):
            sample = as_sample(batch)
            size = len(sample.image)
            if self.order is None:
                index = torch.arange(first, first + size)
            else:
                index = torch.as_tensor(list(self.order[first : first + size]), dtype=torch.int64)
            first += size
            if not self.shared and number % ranks != rank:
                continue
            sample = sample._replace(index=index)
            if self._wanted is not None:
                rows = [row for row, one in enumerate(index.tolist()) if one in self._wanted]
                if not rows:
                    continue
                sample = rows_of(sample, rows)
            yield sample

    def digest(self) -> str:
        """Digest of all pixels, labels and indices, in order."""
        found = hashlib.sha256()
        for sample in self.batches():
            for value in (sample.image, sample.label, sample.index):
                found.update(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
        return found.hexdigest()[:16]


def images_of(
    images: Any,
    model: nn.Module,
    *,
    labels: Tensor | Sequence[int] | None = None,
    image_size: int | None = None,
    batch_size: int = 16,
) -> Images:
    """The images of a tensor, a DataLoader, a data set or a folder of image files; see `judge` for the arguments.

    Raises:
        InputError: for any other type, and for labels that do not fit.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    if isinstance(images, Tensor):
        return _of_tensor(images, labels, batch_size)
    if labels is not None:
        raise InputError("labels= is for a tensor of images; a data set or loader has its own labels")
    if isinstance(images, DataLoader):
        return _of_loader(images)
    if isinstance(images, str | Path):
        from interp_models.data.image_files import ImageFiles

        images = ImageFiles(split="test", root=str(images))
    if isinstance(images, ImageDataset):
        return _of_dataset(images, model, image_size, batch_size)
    if isinstance(images, Dataset) or (hasattr(images, "__getitem__") and hasattr(images, "__len__")):
        if isinstance(images, IterableDataset):
            return _of_loader(DataLoader(images, batch_size=batch_size))
        classes = getattr(images, "classes", ())
        loader: Any = DataLoader(images, batch_size=batch_size, collate_fn=_collated)
        return Images(loader, range(len(images)), name=type(images).__name__, classes=classes)
    raise InputError(
        "images must be a tensor (N, C, H, W), a DataLoader, a data set, or a folder of image files; got "
        f"{type(images).__name__}"
    )


def _of_tensor(images: Tensor, labels: Any, batch_size: int) -> Images:
    from interp_models.core.inputs import check_images

    check_images(images, "images")
    known = torch.full((len(images),), -1) if labels is None else torch.as_tensor(labels)
    if known.shape != (len(images),) or known.is_floating_point():
        raise InputError(f"labels must be {len(images)} whole numbers, one per image; got {tuple(known.shape)}")
    loader: Any = DataLoader(TensorDataset(images, known.long().to(images.device)), batch_size=batch_size)
    return Images(loader, range(len(images)), name="tensor")


def _of_loader(loader: DataLoader[Any]) -> Images:
    name = type(loader.dataset).__name__
    classes = getattr(loader.dataset, "classes", ())
    is_sequential = loader.batch_sampler is not None and type(loader.sampler) in (SequentialSampler, DistributedSampler)
    if is_sequential and isinstance(loader.sampler, SequentialSampler | DistributedSampler):
        shared = isinstance(loader.sampler, DistributedSampler)
        return Images(loader, list(loader.sampler), shared=shared, name=name, classes=classes)
    if isinstance(loader.sampler, RandomSampler):
        raise InputError("images: the loader shuffles, so images cannot be numbered; pass a loader with shuffle=False")
    return Images(loader, None, name=name, classes=classes)


def _of_dataset(images: ImageDataset, model: nn.Module, image_size: int | None, batch_size: int) -> Images:
    from interp_models.data.transforms import transform_of
    from interp_models.evaluation.normalisation import data_config

    about = data_config(model)
    size = image_size or int(about["input_size"][-1])
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
    )


class _Prepared(Dataset[Sample]):
    """A data set of this package with a transform."""

    def __init__(self, images: ImageDataset, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.transform(self.images.load(index))
        return sample


def _collated(items: Sequence[Any]) -> Any:
    return collate(items) if isinstance(items[0], Sample) else torch.utils.data.default_collate(list(items))


def as_sample(batch: Any) -> Sample:
    """Convert a batch to a `Sample`; unknown labels become -1.

    Args:
        batch: a `Sample`, a tensor of images, a pair of images and labels, or a dict.

    Raises:
        InputError: if the batch has no images.
    """
    if isinstance(batch, Sample):
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
    known = torch.full((len(image),), -1)
    if isinstance(label, Tensor) and label.shape == (len(image),) and not label.is_floating_point():
        known = label.long()
    return Sample(image, known, torch.arange(len(image)))
