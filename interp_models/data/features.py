"""Cached features of a frozen backbone, computed once and read in place of images."""

import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from interp_models.core.digests import _bytes, network_digest
from interp_models.core.errors import InputError
from interp_models.core.files import whole
from interp_models.core.modes import evaluating
from interp_models.data.base import Sample, collate, written_label
from interp_models.data.contents import content_digests
from interp_models.data.module import DataModule, TransformedDataset
from interp_models.data.sampling import AGAIN
from interp_models.data.subsets import spread

CHUNK = 32
"""Number of images per file."""


OPEN = 256
"""Maximum number of open files per process; systems allow about a thousand."""


LOOKED_AT = 16
"""Number of images whose transformed pixels identify the transform in the key."""


class CachedFeatures(Dataset[Sample]):
    """A data set that returns cached features (C, h, w) in place of images, by `(epoch, position)`.

    Args:
        dataset: the images. From epoch `epochs` on they are returned.
        order: indices of all images with cached features, ascending.
        files: for each copy the arrays of features, each of `CHUNK` images. Epoch e reads copy e modulo their number.
        epochs: number of epochs on features; None is all.
    """

    def __init__(
        self,
        dataset: TransformedDataset,
        order: NDArray[np.int64],
        files: Sequence[Sequence[Path]],
        epochs: int | None = None,
    ) -> None:
        self.dataset, self.order, self.files, self.epochs = dataset, order, files, epochs
        self._arrays: dict[Path, NDArray[np.float32]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        (again, epoch), position = divmod(key[0], AGAIN), key[1]
        if self.epochs is not None and epoch >= self.epochs:
            return self.dataset[key]
        index = int(self.dataset.indices[position])
        number, row = divmod(int(np.searchsorted(self.order, index)), CHUNK)
        path = self.files[(epoch + again) % len(self.files)][number]
        if path not in self._arrays:
            if len(self._arrays) == OPEN:
                self._arrays.pop(next(iter(self._arrays)))
            try:
                array = np.load(path, mmap_mode="c")
                if array.dtype != np.float32 or array.ndim != 4 or len(array) <= row:
                    raise ValueError(f"{array.dtype} of shape {array.shape}")
                self._arrays[path] = array
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"feature_cache: {path} cannot be read; delete it ({error})") from None
        features = torch.from_numpy(self._arrays[path][row])
        return Sample(features, self.dataset.images.target(index), index)


def cache_features(
    backbone: nn.Module, data: DataModule, folder: Path, *, copies: int = 0, epochs: int | None = None
) -> dict[str, CachedFeatures]:
    """Compute a backbone's features of the training and validation images, and cache them in files.

    The backbone runs in eval mode and float32. Without `copies`, the features of both splits are of images without
    augmentation. They are cached together, so that trainings with other splits and seeds find them. With k copies,
    the training images are augmented as epochs 0 to k - 1 augment them. The features lie in a subfolder of `folder`,
    named by a digest of network, transform and data, and of the seed if there are copies. Existing files are not
    computed again. Ranks share the work. Before the first file is written, a line says how large they are.

    Args:
        backbone: maps images (B, 3, H, W) to features (B, C, h, w); on the device that is to compute.
        data: the data module.
        folder: folder of all cached features, on a disk that all ranks see.
        copies: number k of augmented copies of each training image; 0 has one without augmentation.
        epochs: number of epochs on features, see `CachedFeatures`.

    Returns:
        The data sets of cached features for `train` and `val`; an empty split is left out.

    Raises:
        InputError: if the folder cannot be written, has too little space, or ranks do not see each other's files.
    """
    train, val = data.dataset("train", augment=copies > 0), data.dataset("val", augment=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"feature_cache={folder} cannot be made: {error}") from None
    if copies or data.transform.crops_training_images:
        parts = {"train": _Store(train, data.train_indices, copies), "val": _Store(val, data.val_indices, 0)}
    else:
        order = np.union1d(data.train_indices, data.val_indices)
        parts = dict.fromkeys(("train", "val"), _Store(train, order, 0))
    stores = [store for store in dict.fromkeys(parts.values()) if len(store.order)]
    for store in stores:
        store.find(backbone, data, folder)
    _tell_size(backbone, data, stores, folder)
    for store in stores:
        store.fill(backbone, data)
    if data.trainer is not None:
        data.trainer.strategy.barrier()
    unseen = [file for store in stores for files in store.files for file in files if not file.is_file()]
    if unseen:
        raise InputError(f"feature_cache: {unseen[0]} is missing; all processes must see the same folder")
    return {
        split: CachedFeatures(images, parts[split].order, parts[split].files, epochs)
        for split, images in (("train", train), ("val", val))
        if len(images)
    }


class _Store:
    """The files of the features of some images.

    Args:
        like: a data set with the images and their transform.
        order: indices of the images, ascending.
        copies: number of augmented copies; 0 has one without augmentation.
    """

    def __init__(self, like: TransformedDataset, order: NDArray[np.int64], copies: int) -> None:
        self.order, self.copies = np.sort(order), copies
        self.images = TransformedDataset(like.images, self.order, like.transform, like.seed)
        self.files: list[list[Path]] = []
        """Paths by copy and number."""

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Copy and number of each file that is not there."""
        return [(c, n) for c, files in enumerate(self.files) for n, file in enumerate(files) if not file.is_file()]

    def find(self, backbone: nn.Module, data: DataModule, folder: Path) -> None:
        """Find out where the files lie."""
        trainer, names = data.trainer, list[str]()
        if trainer is None or trainer.global_rank == 0:
            contents = content_digests(self.images.images, self.order.tolist(), folder, shown=data.shows_progress)
            more = f"{data.transform_key} {self.images.seed if self.copies else None}"
            names = [digest(backbone, self.images, contents, more)]
        own = folder / (trainer.strategy.broadcast(names) if trainer else names)[0]
        try:
            own.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"feature_cache={folder}: {own.name} cannot be made: {error}") from None
        numbers = range(-(-len(self.order) // CHUNK))
        prefixes = [f"{copy:05d}-" for copy in range(self.copies)] or [""]
        self.files = [[own / f"{prefix}{number:05d}.npy" for number in numbers] for prefix in prefixes]

    def fill(self, backbone: nn.Module, data: DataModule) -> None:
        """Write this rank's share of the missing files."""
        rank, world = (data.trainer.global_rank, data.trainer.world_size) if data.trainer else (0, 1)
        wanted = [(c, n) for c, files in enumerate(self.files) for n in range(len(files))][rank::world]
        missing = sorted(set(wanted) & set(self.missing))
        chunks = [[(c, p) for p in range(n * CHUNK, min((n + 1) * CHUNK, len(self.order)))] for c, n in missing]
        loader: Any = DataLoader(self.images, batch_sampler=chunks, num_workers=data.num_workers, collate_fn=collate)
        device = next(backbone.parameters()).device
        bar = tqdm(loader, "features", leave=False, unit="file", disable=not data.shows_progress or not missing)
        with torch.no_grad(), evaluating(backbone), torch.autocast(device.type, enabled=False):
            for (copy, number), batch in zip(missing, bar, strict=True):
                parts = [backbone(part.to(device)).float().cpu() for part in batch.image.split(data.batch_size)]
                file = self.files[copy][number]
                try:
                    with whole(file) as path, path.open("wb") as opened:
                        np.save(opened, torch.cat(parts).contiguous().numpy())
                except OSError as error:
                    raise InputError(f"feature_cache: {file} cannot be written: {error}") from None


def _tell_size(backbone: nn.Module, data: DataModule, stores: Sequence[_Store], folder: Path) -> None:
    """Say how large the missing files are, and refuse a disk without the space for them."""
    size, free, first = 0, 0, data.trainer is None or data.trainer.is_global_zero
    count = sum(min(CHUNK, len(store.order) - number * CHUNK) for store in stores for _, number in store.missing)
    if first and count:
        image = torch.zeros(1, 3, data.image_size, data.image_size, device=next(backbone.parameters()).device)
        with torch.no_grad(), evaluating(backbone):
            size = count * backbone(image).numel() * 4  # bytes of a float32
        free = shutil.disk_usage(folder).free
    if data.trainer is not None:  # the others wait until the first has counted, and all agree
        size, free = data.trainer.strategy.broadcast((size, free))
    if not size:
        return
    if size > free:
        raise InputError(f"feature_cache={folder}: the features take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    if first:
        print(f"feature_cache: {count} images give {size / 1e6:.0f} MB of features in {folder}", file=sys.stderr)


def digest(backbone: nn.Module, dataset: TransformedDataset, contents: Sequence[str], more: str) -> str:
    """Digest that identifies the features of a data set.

    It covers the network, the names, labels and contents of the images, the options of the transform and, with copies,
    the seed, in `more`, and the transformed pixels of a few images: the transform's code may have changed.
    """
    found = hashlib.sha256((network_digest(backbone) + more).encode())
    for index, content in zip(dataset.indices.tolist(), contents, strict=True):
        line = f"{dataset.images.image_id(index)} {written_label(dataset.images, index)} {content}\n"
        found.update(line.encode(errors="surrogateescape"))
    for position in spread(len(dataset), LOOKED_AT):
        found.update(_bytes(dataset[0, position].image))
    return found.hexdigest()[:16]
