"""Training on cached features of a frozen backbone."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.data.base import Sample
from interp_models.data.features import cache_features
from interp_models.data.module import data_of
from interp_models.nn.backbone import Backbone


class FeatureCache(pl.Callback):
    """Trains on cached features in place of images.

    Before the training it computes the features of all training and validation images, see `cache_features`. During a
    step the batch holds features, and the backbone's `forward` returns them. Use it only for trainings that
    `check_features` admits.

    Args:
        folder: folder of the cached features; several trainings can share it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, folder: str | None) -> "list[FeatureCache]":
        """A list with the callback if a folder is given; else an empty list."""
        return [] if folder is None else [cls(Path(folder))]

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compute the features that are not cached yet."""
        data, backbone = data_of(trainer), module.get_submodule("backbone")
        backbone.to(trainer.strategy.root_device)
        data.cached_features = cache_features(backbone, data, self.folder)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Sample, batch_idx: int
    ) -> None:
        """Let the backbone return the features of the batch."""
        _give(module, batch.image)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Restore the backbone: other callbacks, such as pictures, use images."""
        _take_back(module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the backbone return the features of the batch."""
        _give(module, batch.image)

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Restore the backbone."""
        _take_back(module)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Restore the backbone and the data module: tests and other trainings use images."""
        _take_back(module)
        data_of(trainer).cached_features = {}

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the backbone and the data module."""
        self.on_fit_end(trainer, module)


def _give(module: pl.LightningModule, features: Tensor) -> None:
    """Let the module's backbone return the features of a batch, and refuse any other input, until `_take_back`."""

    def forward(images: Tensor) -> Tensor:
        if images is not features:
            raise InputError("feature_cache: the model needs more than the batch's images, as for model.crop_drop")
        return features

    if isinstance(backbone := getattr(module, "backbone", None), Backbone):  # others are refused before
        backbone.forward = forward  # type: ignore[method-assign]  # of this object only


def _take_back(module: pl.LightningModule) -> None:
    """Let the module's backbone compute features again."""
    if isinstance(backbone := getattr(module, "backbone", None), Backbone):
        vars(backbone).pop("forward", None)
