"""Training on features of a frozen backbone that are computed once."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.data.base import Sample
from interp_models.data.features import store_features
from interp_models.data.module import data_of
from interp_models.nn.backbone import Backbone


class FeatureCache(pl.Callback):
    """Trains on stored features in place of images.

    Before the training it stores the features of all training and validation images, see `store_features`. During a
    step the batch holds features, and the backbone is replaced by a function that returns them. What `check_features`
    refuses must not be trained so.

    Args:
        folder: of the caches; they may serve other trainings.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, folder: str | None) -> "list[FeatureCache]":
        """The callback that a config asks for, if it does."""
        return [] if folder is None else [cls(Path(folder))]

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compute what is missing."""
        data, backbone = data_of(trainer), module.get_submodule("backbone")
        backbone.to(trainer.strategy.root_device)
        data.cached_features = store_features(backbone, data, self.folder)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Sample, batch_idx: int
    ) -> None:
        """The batch has features."""
        _give(module, batch.image)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """What comes between batches, such as pictures, has images."""
        _take_back(module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """The batch has features."""
        _give(module, batch.image)

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """As after a batch of the training."""
        _take_back(module)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Other trainings with the same data, and tests, have images."""
        _take_back(module)
        data_of(trainer).cached_features = {}

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """As at the end."""
        self.on_fit_end(trainer, module)


def _give(module: pl.LightningModule, features: Tensor) -> None:
    """Have the module's backbone return these features of a batch, and refuse all other images, until `_take_back`."""

    def forward(images: Tensor) -> Tensor:
        if images is not features:
            raise InputError("feature_cache: the model needs more than the batch's images, as for model.crop_drop")
        return features

    if isinstance(backbone := getattr(module, "backbone", None), Backbone):  # else it was refused
        backbone.forward = forward  # type: ignore[method-assign]  # of this one alone, in place of its class's


def _take_back(module: pl.LightningModule) -> None:
    """Have the module's backbone compute its features again."""
    if isinstance(backbone := getattr(module, "backbone", None), Backbone):
        vars(backbone).pop("forward", None)
