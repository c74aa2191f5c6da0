"""The data module: splits, order and augmentation, all functions of the seed, the epoch and the sample."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from interp_models.data.base import DATASETS, ImageDataset, Sample, collate
from interp_models.data.choice import Indices, stratified_split
from interp_models.data.contents import content_digests
from interp_models.data.transforms import (
    Name,
    crop_to_box,
    hide_outside,
    plain_transform,
    random_corner,
    train_transform,
)
from interp_models.errors import InputError
from interp_models.registry import named
from interp_models.rng import seed_of, uniform


class Renumbered(ImageDataset):
    """A data set whose labels are positions in a longer list of classes, which has its own in the same order."""

    def __init__(self, images: ImageDataset, classes: Sequence[str]) -> None:
        position = {name: label for label, name in enumerate(classes)}
        self._images = images
        self.classes = list(classes)
        self.labels = [position[images.classes[label]] for label in images.labels]
        self.part_names, self.mask_names = images.part_names, images.mask_names

    def image_id(self, index: int) -> str:
        """As the data set's own."""
        return self._images.image_id(index)

    def files(self, index: int) -> tuple[Path, ...]:
        """As the data set's own."""
        return self._images.files(index)

    def annotation(self, index: int) -> str:
        """As the data set's own."""
        return self._images.annotation(index)

    def load(self, index: int) -> Sample:
        """As the data set's own, but for the label."""
        return self._images.load(index)._replace(label=self.labels[index])


class TransformedDataset(Dataset[Sample]):
    """Some images of a data set, transformed; the randomness of an item is a function of seed, epoch and its index.

    Items are addressed by `(epoch, position)`, so that worker processes need no shared state.
    """

    def __init__(
        self,
        images: ImageDataset,
        indices: Indices,
        transform: v2.Transform,
        seed: int,
        crop: Callable[[Sample], Sample] | None,
    ) -> None:
        self.images = images
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.crop = crop

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, position = key
        index = int(self.indices[position])
        sample = self.images.load(index)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the generators of GPUs too, which dropout draws from.
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            sample = cast(Sample, self.transform(self.crop(sample) if self.crop else sample))
        return hide_outside(sample)


class ShardSampler(Sampler[tuple[int, int]]):
    """This rank's positions of an epoch as `(epoch, position)`.

    In training (`global_batch` is given) the order is a permutation by seed and epoch, and the last incomplete batch
    over all ranks is dropped unless it is the only one: ranks must step together, no image counts twice, and two
    ranks see what one sees with twice the batch. In evaluation the order is that of the data and nothing is dropped
    or repeated, so that n equals the data set.
    """

    def __init__(self, size: int, *, rank: int, world: int, seed: int = 0, global_batch: int | None = None) -> None:
        self.size, self.rank, self.world, self.seed, self.global_batch = size, rank, world, seed, global_batch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning when an epoch begins."""
        self.epoch = epoch

    @property
    def _total(self) -> int:
        """Positions of all ranks together."""
        if self.global_batch is None:
            return self.size
        return self.size // self.global_batch * self.global_batch or -(-self.size // self.world) * self.world

    def __len__(self) -> int:
        return len(range(self.rank, self._total, self.world))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        positions = np.arange(self.size)
        if self.global_batch is not None:
            positions = np.argsort(uniform(self.seed, self.epoch, positions), kind="stable")
        for position in np.resize(positions, self._total)[self.rank :: self.world]:
            yield self.epoch, int(position)


class DataModule(pl.LightningDataModule):
    """Train, validation and test images of one data set.

    Args:
        dataset: `name` and options of a registered data set.
        image_size: side of the images in pixels after the transforms.
        batch_size: images per step and device.
        num_workers: processes that load images; 0 loads in the main process.
        val_fraction: part of the training images, drawn by seed within each class, that models are selected on;
            0 trains on all and takes the last epoch.
        crop_to_box: crop images to their box first, in training and test, as prototype papers do.
        skip_corrupt: leave out images that cannot be decoded instead of stopping; decodes all images once at the start.
        augment: draw crops, flips and the like in training.
        transforms: whose, see `train_transform` and `plain_transform`. With `prototree`, prototypes are projected on
            images that are cropped to their box, and other images are cropped by `crop_to_box` alone.
        seed: of splits, order and augmentation.
    """

    def __init__(
        self,
        *,
        dataset: dict[str, Any],
        image_size: int = 224,
        batch_size: int = 16,
        num_workers: int = 2,
        val_fraction: float = 0.1,
        crop_to_box: bool = False,
        skip_corrupt: bool = False,
        augment: bool = True,
        transforms: Name = "wsdan",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise InputError(f"data.val_fraction must be in [0, 1); got {val_fraction}")
        for key, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise InputError(f"data.{key} must be at least {least}; got {value}")
        name, options = named(dataset, "data.dataset", DATASETS)
        self.image_size, self.batch_size, self.num_workers, self.seed = image_size, batch_size, num_workers, seed
        self.crop_to_box, self.augment, self.transforms = crop_to_box, augment, transforms
        self.train_images = DATASETS.build(name, options, split="train")
        self.test_images = DATASETS.build(name, options, split="test")
        for split, images in (("train", self.train_images), ("test", self.test_images)):
            if not len(images):
                raise InputError(f"data set {name!r} has no {split} images")
        self.skipped: list[str] = []
        """Identifiers of corrupt images that were left out."""
        kept = self._readable(self.train_images) if skip_corrupt else np.arange(len(self.train_images))
        self.test_indices = self._readable(self.test_images) if skip_corrupt else np.arange(len(self.test_images))
        for split, indices in (("train", kept), ("test", self.test_indices)):
            if not len(indices):
                raise InputError(f"data set {name!r}: no {split} image can be decoded")
        self._whole_test = self.test_indices
        self._contents: dict[tuple[str, bytes], list[str]] = {}
        self.stored: Mapping[str, Dataset[Sample]] = {}
        """Splits whose features a training reads in place of images; see `store_features`."""
        self.train_indices, self.val_indices = stratified_split(
            np.asarray(self.train_images.labels), kept, val_fraction, seed
        )
        if val_fraction and not len(self.val_indices):
            raise InputError(f"data.val_fraction={val_fraction} leaves no validation image; use 0 or a larger fraction")

    @property
    def classes(self) -> list[str]:
        """Class names by label."""
        return list(self.train_images.classes)

    @property
    def shows_progress(self) -> bool:
        """Whether work on these data is to show a bar: on one rank, unless its trainer shows none."""
        trainer = self.trainer
        return trainer is None or (trainer.is_global_zero and trainer.progress_bar_callback is not None)

    def _readable(self, images: ImageDataset) -> Indices:
        kept = []
        for index in range(len(images)):
            try:
                images.load(index)
                kept.append(index)
            except InputError:
                self.skipped.append(images.image_id(index))
        return np.asarray(kept, dtype=np.int64)

    def dataset(self, split: str, *, augment: bool = True) -> TransformedDataset:
        """The images of `train`, `val`, `test` or `whole_test`.

        Those of `train` are augmented unless config or caller says no. An evaluation may have drawn some of `test`;
        `whole_test` has all.
        """
        images = self.train_images if split in ("train", "val") else self.test_images
        indices = {
            "train": self.train_indices,
            "val": self.val_indices,
            "test": self.test_indices,
            "whole_test": self._whole_test,
        }[split]
        augmented = split == "train" and self.augment and augment
        make = train_transform if augmented else plain_transform
        crop = crop_to_box if self.crop_to_box else None
        if split == "train" and self.transforms == "prototree":
            crop = random_corner if augmented else crop_to_box
        return TransformedDataset(images, indices, make(self.image_size, self.transforms), self.seed, crop)

    def fingerprint(self, split: str, *, contents: bool = False) -> int:
        """A number from 0 to 2**62 - 1 that tells one set of images from another by their names, order and labels, and
        by their contents where asked; see `contents`."""
        dataset = self.dataset(split)
        lines = [f"{dataset.images.image_id(int(i))} {dataset.images.labels[int(i)]}" for i in dataset.indices]
        lines += self.contents(split) if contents else []
        text = "\n".join(lines).encode(errors="surrogateescape")
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 2

    def contents(self, split: str, folder: Path | None = None) -> list[str]:
        """The digest of every image of a split with its ground truth, computed once; see `content_digests`."""
        dataset = self.dataset(split)
        key = (split, dataset.indices.tobytes())
        if key not in self._contents:
            self._contents[key] = content_digests(
                dataset.images, dataset.indices.tolist(), folder, shown=self.shows_progress
            )
        return self._contents[key]

    def as_classes(self, names: Sequence[str], whose: str) -> None:
        """Number the classes as a model does that was trained on `names`, of which the data set may have a part.

        Raises:
            InputError: if a class of the data set is not among the names, or stands in another order.
        """
        own = self.classes
        if own == list(names):
            return
        if unknown := [name for name in own if name not in names]:
            raise InputError(
                f"{whose}: the data set has a class {unknown[0]!r} that the model was not trained on; it knows "
                f"{_listed(names)}"
            )
        expected = [name for name in names if name in own]
        for label, (is_name, was) in enumerate(zip(own, expected, strict=True)):
            if is_name != was:
                raise InputError(
                    f"{whose}: the data set's classes stand in another order than the model's: class {label} is "
                    f"{is_name!r}, and {was!r} in the model"
                )
        self.train_images = Renumbered(self.train_images, names)
        self.test_images = Renumbered(self.test_images, names)

    def loader(self, split: str, *, shuffle: bool = False, augment: bool = True) -> DataLoader[Sample]:
        """A loader over this rank's share of a split, in the order of the data unless shuffled."""
        return self._loader(self.dataset(split, augment=augment), split, shuffle=shuffle)

    def _loader(self, dataset: Any, split: str, *, shuffle: bool) -> DataLoader[Sample]:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        if len(dataset) < world:
            raise InputError(f"{world} processes need at least as many {split} images; there are {len(dataset)}")
        sampler = ShardSampler(
            len(dataset),
            rank=rank,
            world=world,
            seed=self.seed,
            global_batch=self.batch_size * world if shuffle else None,
        )
        if trainer and shuffle:
            # Lightning sets the epoch after it has made the iterator, and worker processes begin at once: the first
            # epoch of a resumed run would have the order of epoch 0.
            progress: Any = trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(progress.processed)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """Positions among the training images of every step of an epoch, those of all ranks together."""
        world = self.trainer.world_size if self.trainer else 1
        size = self.batch_size * world
        sampler = ShardSampler(len(self.train_indices), rank=0, world=1, seed=self.seed, global_batch=size)
        sampler.set_epoch(epoch)
        positions = [position for _, position in sampler]
        return (positions[first : first + size] for first in range(0, len(positions), size))

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled and augmented, or stored features."""
        return self._loader(self.stored.get("train", self.dataset("train")), "train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """The held-out part of the training images, or its stored features; empty with `val_fraction=0`."""
        if not len(self.val_indices):
            return []
        return self._loader(self.stored.get("val", self.dataset("val")), "val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Sample]:
        """The official test images."""
        return self.loader("test")


def _listed(names: Sequence[str]) -> str:
    """The first names of many.

    >>> _listed(["a", "b"])
    "'a', 'b'"
    """
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} others"


def data_of(trainer: pl.Trainer) -> "DataModule":
    """The data module that a trainer works on."""
    data: DataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by fit() and test(), not declared
    return data
