"""The data module: splits, order and augmentation are functions of the seed, the epoch and the sample."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from interp_models.core.digests import code_digest
from interp_models.core.errors import InputError
from interp_models.core.registry import named
from interp_models.core.rng import seed_of
from interp_models.data.base import DATASETS, ImageDataset, Sample, collate, labels_of, loaded, written_label
from interp_models.data.checks import by_kind, check_labels, refuse, some, unusable
from interp_models.data.contents import content_digests
from interp_models.data.listing import joined
from interp_models.data.sampling import ShardSampler as ShardSampler
from interp_models.data.subsets import Indices, strata, stratified_split
from interp_models.data.transforms import crop_to_box, hide_outside, transform_of, transform_options


class Renumbered(ImageDataset):
    """Wraps a data set that has only some of a model's classes: labels are the model's, `classes` lists all of them."""

    def __init__(self, images: ImageDataset, classes: Sequence[str]) -> None:
        position = {name: label for label, name in enumerate(classes)}
        self._images = images
        self.classes, self.multilabel = list(classes), images.multilabel
        if images.multilabel:
            self.labels = [tuple(position[images.classes[label]] for label in own) for own in images.labels]
        else:
            self.labels = [label if label < 0 else position[images.classes[label]] for label in images.labels]
        self.part_names, self.mask_names = images.part_names, images.mask_names
        self.validation, self.note, self.left_out = images.validation, images.note, images.left_out
        self.drawn = images.drawn

    def image_id(self, index: int) -> str:
        """As in the wrapped data set."""
        return self._images.image_id(index)

    def files(self, index: int) -> tuple[Path, ...]:
        """As in the wrapped data set."""
        return self._images.files(index)

    def annotation(self, index: int) -> str:
        """As in the wrapped data set."""
        return self._images.annotation(index)

    def load(self, index: int) -> Sample:
        """The sample of the wrapped data set, with the model's label."""
        return self._images.load(index)._replace(label=self.target(index))


class TransformedDataset(Dataset[Sample]):
    """Transformed images of a data set, by `(epoch, position)`.

    Random transforms are functions of seed, epoch and index of the image, so that loader processes share no state.
    """

    def __init__(
        self,
        images: ImageDataset,
        indices: Indices,
        transform: v2.Transform,
        seed: int,
    ) -> None:
        self.images = images
        self.indices = indices
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, position = key
        index = int(self.indices[position])
        sample = loaded(self.images, index)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the generators of GPUs, which dropout uses.
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            sample = cast(Sample, self.transform(sample))
        if self.images.multilabel and not _is_multi_hot(sample.label, len(self.images.classes)):
            raise InputError(
                f"{type(self.images).__name__}: the data set has several labels per image; the label of a "
                f"sample must be bool ({len(self.images.classes)},), as target(index) gives it; got {sample.label!r}"
            )
        return hide_outside(sample)


class DataModule(pl.LightningDataModule):
    """Training, validation and test images of one data set.

    Args:
        dataset: `name` and options of a registered data set.
        image_size: side of the images in pixels after the transforms.
        batch_size: images per step and device.
        num_workers: number of processes that load images; 0 loads in the main process.
        val_fraction: fraction of the training images of each class, drawn by seed, for validation; the best epoch is
            selected on them. 0 trains on all images and selects the last epoch. If the data set has validation images
            of its own, these are used instead, and only 0 or not 0 matters.
        crop_to_box: whether to crop all images to their box first, as prototype papers do.
        skip_corrupt: whether to leave out images that cannot be loaded instead of stopping; all images are then decoded
            once at the start.
        balanced: whether every class occurs equally often in a training epoch; the number of images stays the same.
        augment: whether to augment training images.
        transforms: the name of a registered transform, or a mapping with its `name` and options.
        seed: seed of splits, order and augmentation.
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
        balanced: bool = False,
        augment: bool = True,
        transforms: Annotated[Any, "options"] = "crop_flip_jitter",
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
        self.crop_to_box, self.augment = crop_to_box, augment
        self.transform = transform_of(transforms, image_size)
        made = [transform_options(transforms), image_size, crop_to_box, code_digest(type(self.transform))]
        self.transform_key = json.dumps(made, sort_keys=True, default=str)
        """All that the transforms of the images follow from, as text."""
        self.skip_corrupt, self.balanced = skip_corrupt, balanced
        try:
            self.train_images = DATASETS.build(name, options, split="train")
            self.test_images = DATASETS.build(name, options, split="test")
        except OSError as error:  # e.g. a folder without permission
            raise InputError(f"data set {name!r} cannot be read: {error}") from None
        for split, images in self._splits():
            if not len(images):
                raise InputError(f"data set {name!r} has no {split} images")
            check_labels(images, f"data set {name!r}, {split} image")
        if self.train_images.multilabel != self.test_images.multilabel:
            raise InputError(f"data set {name!r}: images of one split have several labels, those of the other do not")
        if balanced and self.multilabel:
            raise InputError("data.balanced needs one class per image; the images of this data set have several labels")
        self.skipped: dict[str, str] = {}
        """Images that are left out: the reason by image id."""
        kept, self.test_indices = (self._kept(split, images) for split, images in self._splits())
        self._whole_test = self.test_indices
        self.memory: Path | None = None
        """Folder of the file with digests of images, see `content_digests`."""
        self._contents: dict[tuple[str, bytes], list[str]] = {}
        self.cached_features: Mapping[str, Dataset[Sample]] = {}
        """Data sets of cached features by split; the loaders use them in place of images. See `cache_features`."""
        if len(self.train_images.validation):
            own = np.isin(kept, self.train_images.validation)
            self.train_indices, self.val_indices = kept[~own], kept[own] if val_fraction else kept[:0]
        else:
            own_labels = self.train_images.labels
            labels = strata(own_labels, kept) if self.multilabel else np.asarray(own_labels)
            self.train_indices, self.val_indices = stratified_split(labels, kept, val_fraction, seed)
        self.val_fraction = val_fraction

    @property
    def classes(self) -> list[str]:
        """Class names by label."""
        return list(self.train_images.classes)

    @property
    def multilabel(self) -> bool:
        """Whether images have several labels."""
        return self.train_images.multilabel

    @property
    def has_labels(self) -> bool:
        """Whether every test image has a class, or images have several labels; image files have no labels."""
        return self.multilabel or min(self.test_images.labels, default=-1) >= 0

    def labelled(self, indices: Indices) -> Indices:
        """Those of the test images `indices` that have a label."""
        return np.asarray([i for i in indices.tolist() if labels_of(self.test_images, i)], dtype=np.int64)

    @property
    def shows_progress(self) -> bool:
        """Whether to show progress bars: on rank 0, unless the trainer shows none."""
        trainer = self.trainer
        return trainer is None or (trainer.is_global_zero and trainer.progress_bar_callback is not None)

    def _splits(self) -> list[tuple[str, ImageDataset]]:
        return [("train", self.train_images), ("test", self.test_images)]

    def _kept(self, split: str, images: ImageDataset) -> Indices:
        """The images of a split without those that `skip_corrupt` leaves out."""
        reasons = unusable(images, range(len(images)), decode=True) if self.skip_corrupt else {}
        self.skipped |= {images.image_id(index): reason for index, reason in reasons.items()}
        if len(reasons) == len(images):
            raise InputError(
                f"no {split} image of {len(images)} can be loaded; the first: {next(iter(reasons.values()))}"
            )
        return np.setdiff1d(np.arange(len(images)), np.asarray(list(reasons), dtype=np.int64))

    def check_training(self, devices: int = 1) -> None:
        """Raise `InputError` if `val_fraction` leaves no validation image, or a split has fewer images than devices."""
        if self.val_fraction and not len(self.val_indices):
            raise InputError(
                f"data.val_fraction={self.val_fraction} leaves no validation image; use 0 or a larger fraction"
            )
        for split, indices in (("train", self.train_indices), ("val", self.val_indices), ("test", self.test_indices)):
            if 0 < len(indices) < devices:
                raise InputError(f"{devices} processes need at least as many {split} images; there are {len(indices)}")
            if self.multilabel and len(indices) and not self._present(split):
                raise InputError(f"no {split} image has a label; no class can be learnt or measured")

    def check_files(self, *splits: str) -> None:
        """Check that the image files of splits exist and look complete; only suspicious ones are decoded.

        Args:
            splits: `train`, `val`, `test` or `whole_test`.

        Raises:
            InputError: if a file is missing or broken; the message has the number of such files.
        """
        sets = [] if self.skip_corrupt else [self.dataset(split) for split in splits]
        refuse([reason for own in sets for reason in unusable(own.images, own.indices, decode=False).values()])

    def classes_without(self, split: str) -> list[str]:
        """Names of the classes without an image in a split (`train`, `val`, `test` or `whole_test`)."""
        present = self._present(split)
        return [name for label, name in enumerate(self.classes) if label not in present]

    def _present(self, split: str) -> set[int]:
        """The classes with an image in a split."""
        own = self.dataset(split)
        return {label for index in own.indices for label in labels_of(own.images, int(index))}

    def summary(self) -> str:
        """One line with the number of classes, the images per split, how splits were made, and what is left out."""
        test, whole = len(self.test_indices), len(self._whole_test)
        tested = f"{test} test images" if test == whole else f"{test} of {whole} test images"
        if self.classes and self.has_labels:
            parts = [f"{len(self.classes)} classes{', several per image' * self.multilabel}"]
            parts += [f"{len(self.train_indices)} training, {len(self.val_indices)} validation, {tested}"]
        else:
            parts = [f"{tested.replace(' test', '')} without labels"]
        parts += [note for note in dict.fromkeys(images.note for _, images in self._splits()) if note]
        if self.train_images.validation and not len(self.val_indices):
            parts += [f"{len(self.train_images.validation)} validation images are not used, as val_fraction is 0"]
        for split, name in (("train", "training"), ("whole_test", "test")):
            if self.has_labels and (without := self.classes_without(split)):
                parts += [f"classes without a {name} image: {some(without)}"]
        listed = joined(*(images.left_out for _, images in self._splits()))
        left_out = {kind: some(names) for kind, names in listed.items()} | by_kind(self.skipped)
        parts += [f"left out: {', '.join(f'{kind}: {names}' for kind, names in left_out.items())}"] if left_out else []
        return "; ".join(parts)

    def dataset(self, split: str, *, augment: bool = True) -> TransformedDataset:
        """The transformed images of a split.

        Args:
            split: `train`, `val`, `test` or `whole_test`. An evaluation may judge only some images of `test`;
                `whole_test` always has all.
            augment: whether to augment training images; the option `augment` of the config must agree.
        """
        images = self.train_images if split in ("train", "val") else self.test_images
        indices = {
            "train": self.train_indices,
            "val": self.val_indices,
            "test": self.test_indices,
            "whole_test": self._whole_test,
        }[split]
        augmented = split == "train" and self.augment and augment
        transform = self.transform.augmented() if augmented else self.transform.evaluation()
        by_transform = split == "train" and self.transform.crops_training_images
        if (self.crop_to_box and not by_transform) or (by_transform and not augmented):
            transform = v2.Compose([crop_to_box, transform])
        return TransformedDataset(images, indices, transform, self.seed)

    def fingerprint(self, split: str, *, contents: bool = False) -> int:
        """A digest of the images of a split, from 0 to 2**62 - 1.

        It covers names, order and labels and, with `contents`, the files and all ground truth.
        """
        dataset = self.dataset(split)
        lines = [f"{dataset.images.image_id(i)} {written_label(dataset.images, i)}" for i in dataset.indices.tolist()]
        lines += self.contents(split) if contents else []
        text = "\n".join(lines).encode(errors="surrogateescape")
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 2

    def contents(self, split: str) -> list[str]:
        """Digests of all images of a split with their ground truth, computed once; see `content_digests`."""
        dataset = self.dataset(split)
        key = (split, dataset.indices.tobytes())
        if key not in self._contents:
            shown = self.trainer is None or self.trainer.is_global_zero
            self._contents[key] = content_digests(dataset.images, dataset.indices.tolist(), self.memory, shown=shown)
        return self._contents[key]

    def as_classes(self, names: Sequence[str], whose: str) -> None:
        """Number the classes as a model that was trained on the classes `names`; the data set may have only some.

        Args:
            names: the model's classes by label.
            whose: the model, as messages name it.

        Raises:
            InputError: if the data set has a class that is not among the names, or another order of classes.
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
                    f"{whose}: the data set's classes have another order than the model's: class {label} is "
                    f"{is_name!r}, but {was!r} in the model"
                )
        self.train_images = Renumbered(self.train_images, names)
        self.test_images = Renumbered(self.test_images, names)

    def loader(self, split: str, *, shuffle: bool = False, augment: bool = True) -> DataLoader[Sample]:
        """A loader of this rank's share of a split, shuffled or in the order of the data."""
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
            labels=self._balanced_labels() if shuffle else None,
        )
        if trainer and shuffle:
            # Lightning sets the epoch after it has made the iterator, and loader processes start at once. Without this
            # line the first epoch of a resumed run would have the order of epoch 0.
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

    def _balanced_labels(self) -> Indices | None:
        return np.asarray(self.train_images.labels)[self.train_indices] if self.balanced else None

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """Positions of the training images of each step of an epoch, for all ranks together."""
        world = self.trainer.world_size if self.trainer else 1
        size = self.batch_size * world
        count, labels = len(self.train_indices), self._balanced_labels()
        sampler = ShardSampler(count, rank=0, world=1, seed=self.seed, global_batch=size, labels=labels)
        sampler.set_epoch(epoch)
        positions = [position for _, position in sampler]
        return (positions[first : first + size] for first in range(0, len(positions), size))

    def train_dataloader(self) -> DataLoader[Sample]:
        """Loader of the training images, shuffled and augmented, or of their cached features."""
        return self._loader(self.cached_features.get("train", self.dataset("train")), "train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Loader of the validation images, or of their cached features; empty if `val_fraction` is 0."""
        if not len(self.val_indices):
            return []
        return self._loader(self.cached_features.get("val", self.dataset("val")), "val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Loader of the test images."""
        return self.loader("test")


def _is_multi_hot(label: Any, classes: int) -> bool:
    return isinstance(label, torch.Tensor) and label.dtype == torch.bool and label.shape == (classes,)


def _listed(names: Sequence[str]) -> str:
    """The first few names.

    >>> _listed(["a", "b"])
    "'a', 'b'"
    """
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} others"


def data_of(trainer: pl.Trainer) -> "DataModule":
    """The data module of a trainer."""
    data: DataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by fit() and test(), not declared
    return data
