"""Training on cached features of a frozen backbone."""

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.data.base import Sample
from interp_models.data.features import cache_features
from interp_models.data.module import data_of
from interp_models.nn.backbone import Backbone
from interp_models.training.module import InterpModule
from interp_models.training.recipe import Phase


def phases_on_features(module: InterpModule) -> list[Phase]:
    """The first phases of a training, up to the first that trains the backbone or lets its statistics move."""
    own = {id(parameter) for parameter in module.get_submodule("backbone").parameters()}
    learning = {name for name, group in module.parameter_groups().items() if own & {id(p) for p in group}}

    def leaves_it(phase: Phase) -> bool:
        return not learning & phase.lrs.keys() and "backbone" in phase.eval_modules

    return list(takewhile(leaves_it, module.recipe.phases))


class FeatureCache(pl.Callback):
    """Trains the first phases, which leave the backbone as it is, on cached features in place of images.

    Before the training it computes the features of all training and validation images, see `cache_features`. During a
    step of these phases the batch holds features, and the backbone's `forward` returns them. Later phases have images.
    Use it only for trainings that `check_features` admits.

    Args:
        folder: folder of the cached features; several trainings can share it.
        copies: see `cache_features`.
    """

    def __init__(self, folder: Path, copies: int = 0) -> None:
        self.folder, self.copies = folder, copies
        self.epochs = 0
        """Number of epochs on features."""
        self._saved = -1
        """Epoch of the checkpoint that the training resumes; Lightning sets `current_epoch` after `on_fit_start`."""

    @classmethod
    def of(cls, folder: str | None, copies: int) -> "list[FeatureCache]":
        """A list with the callback if a folder is given; else an empty list."""
        return [] if folder is None else [cls(Path(folder), copies)]

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where the training resumes."""
        self._saved = checkpoint["epoch"]

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compute the features that are not cached yet, unless the training resumes behind them."""
        assert isinstance(module, InterpModule)
        self.epochs = sum(phase.epochs for phase in phases_on_features(module))
        if self._saved + 1 >= self.epochs:
            return
        data, backbone = data_of(trainer), module.get_submodule("backbone")
        backbone.to(trainer.strategy.root_device)
        data.cached_features = cache_features(
            backbone, data, self.folder, copies=min(self.copies, self.epochs), epochs=self.epochs
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Sample, batch_idx: int
    ) -> None:
        """Let the backbone return the features of the batch."""
        if trainer.current_epoch < self.epochs:
            _give(module, batch.image)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Restore the backbone: other callbacks, such as pictures, use images."""
        _take_back(module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the backbone return the features of the batch."""
        if trainer.current_epoch < self.epochs:
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
