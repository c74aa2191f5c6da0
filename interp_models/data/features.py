"""Cached features of a frozen backbone, computed once and read in place of images."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from interp_models.core.digests import _bytes, weights_digest
from interp_models.core.errors import InputError
from interp_models.core.files import whole
from interp_models.core.modes import evaluating
from interp_models.data.base import Sample, collate, written_label
from interp_models.data.contents import content_digests
from interp_models.data.module import DataModule, TransformedDataset
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
        dataset: the images.
        order: indices of all images with cached features, ascending.
        files: the arrays of features, each of `CHUNK` images.
    """

    def __init__(self, dataset: TransformedDataset, order: NDArray[np.int64], files: Sequence[Path]) -> None:
        self.dataset, self.order, self.files = dataset, order, files
        self._arrays: dict[int, NDArray[np.float32]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        _, position = key
        index = int(self.dataset.indices[position])
        number, row = divmod(int(np.searchsorted(self.order, index)), CHUNK)
        if number not in self._arrays:
            if len(self._arrays) == OPEN:
                self._arrays.pop(next(iter(self._arrays)))
            try:
                self._arrays[number] = np.load(self.files[number], mmap_mode="c")
            except (OSError, ValueError, EOFError) as error:
                path = self.files[number]
                raise InputError(f"feature_cache: {path} cannot be read; delete it ({error})") from None
        features = torch.from_numpy(self._arrays[number][row])
        return Sample(features, self.dataset.images.target(index), index)


def cache_features(backbone: nn.Module, data: DataModule, folder: Path) -> dict[str, CachedFeatures]:
    """Compute a backbone's features of the training and validation images, and cache them in files.

    The backbone runs in eval mode and float32 on images without augmentation. The features of both splits are cached
    together, so that trainings with other splits and seeds find them. They lie in a subfolder of `folder`, named by a
    digest of weights, transform and data. Existing files are not computed again. Ranks share the work.

    Args:
        backbone: maps images (B, 3, H, W) to features (B, C, h, w); on the device that is to compute.
        data: the data module.
        folder: folder of all cached features, on a disk that all ranks see.

    Returns:
        The data sets of cached features for `train` and `val`; an empty split is left out.

    Raises:
        InputError: if the folder cannot be written, or ranks do not see each other's files.
    """
    splits = {split: data.dataset(split, augment=False) for split in ("train", "val")}
    order = np.union1d(data.train_indices, data.val_indices)
    first = splits["train"]
    all_images = TransformedDataset(first.images, order, first.transform, first.seed)
    trainer = data.trainer
    rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"feature_cache={folder} cannot be made: {error}") from None
    contents = content_digests(first.images, order.tolist(), folder, shown=data.shows_progress) if rank == 0 else []
    own = folder / digest(backbone, all_images, trainer.strategy.broadcast(contents) if trainer else contents)
    files = [own / f"{number:05d}.npy" for number in range(-(-len(order) // CHUNK))]
    missing = [number for number in range(rank, len(files), world) if not files[number].is_file()]
    try:
        own.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"feature_cache={folder} cannot be made: {error}") from None
    chunks = [[(0, p) for p in range(n * CHUNK, min((n + 1) * CHUNK, len(order)))] for n in missing]
    loader: Any = DataLoader(all_images, batch_sampler=chunks, num_workers=data.num_workers, collate_fn=collate)
    device = next(backbone.parameters()).device
    bar = tqdm(loader, "features", leave=False, unit="file", disable=not data.shows_progress or not missing)
    with torch.no_grad(), evaluating(backbone), torch.autocast(device.type, enabled=False):
        for number, batch in zip(missing, bar, strict=True):
            parts = [backbone(part.to(device)).float().cpu() for part in batch.image.split(data.batch_size)]
            try:
                with whole(files[number]) as path, path.open("wb") as file:
                    np.save(file, torch.cat(parts).contiguous().numpy())
            except OSError as error:
                raise InputError(f"feature_cache: {files[number]} cannot be written: {error}") from None
    if trainer is not None:
        trainer.strategy.barrier()
    unseen = [file for file in files if not file.is_file()]
    if unseen:
        raise InputError(f"feature_cache: {unseen[0]} is missing; all processes must see the same folder")
    return {split: CachedFeatures(images, order, files) for split, images in splits.items() if len(images)}


def digest(backbone: nn.Module, dataset: TransformedDataset, contents: Sequence[str]) -> str:
    """Digest that identifies the features of a data set.

    It covers the backbone's layers and weights, the names, labels and contents of the images, and the transformed
    pixels of a few evenly spread images, which identify the transform.
    """
    found = hashlib.sha256(weights_digest(backbone).encode())
    for index, content in zip(dataset.indices.tolist(), contents, strict=True):
        line = f"{dataset.images.image_id(index)} {written_label(dataset.images, index)} {content}\n"
        found.update(line.encode(errors="surrogateescape"))
    for position in spread(len(dataset), LOOKED_AT):
        found.update(_bytes(dataset[0, position].image))
    return found.hexdigest()[:16]
