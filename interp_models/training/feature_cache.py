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
from interp_models.runs.config import TrainConfig
from interp_models.training.module import InterpModule


class FeatureCache(pl.Callback):
    """Before a training begins, has the features of all training and validation images stored, to be read at every
    step in place of images; see `store_features`. What `check_features` refuses must not be trained so.

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
        data.stored = store_features(backbone, data, self.folder)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Sample, batch_idx: int
    ) -> None:
        """The batch has features."""
        _give(module, batch.image)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """What comes between batches, such as pictures, has images."""
        _give(module, None)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """The batch has features."""
        _give(module, batch.image)

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """As after a batch of the training."""
        _give(module, None)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Other trainings with the same data, and tests, have images."""
        _give(module, None)
        data_of(trainer).stored = {}

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """As at the end."""
        self.on_fit_end(trainer, module)


def _give(module: pl.LightningModule, features: Tensor | None) -> None:
    """Have the module's backbone stand for these features, or for what it computes."""
    backbone = getattr(module, "backbone", None)
    if isinstance(backbone, Backbone):  # else it was refused
        backbone.given = features


def check_features(config: TrainConfig, module: InterpModule) -> None:
    """Raise `InputError` if the config wants features in place of images, and its training needs more of the images, or
    changes the backbone."""
    if config.feature_cache is None:
        return
    if config.data["augment"]:
        raise InputError("feature_cache needs data.augment=false: every image has its features once")
    if config.data["transforms"] == "prototree" and config.data["val_fraction"] and not config.data["crop_to_box"]:
        raise InputError(
            "feature_cache: data.transforms=prototree crops training images only; add data.crop_to_box=true"
        )
    if module.distillation is not None:
        raise InputError("feature_cache: distillation.teacher needs images, not features")
    if config.evaluation.every_n_epochs:
        raise InputError("feature_cache: evaluation.every_n_epochs needs images, not features")
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise InputError(f"feature_cache: {type(module).__name__} has no convolutional backbone")
    own = {id(parameter) for parameter in backbone.parameters()}
    learning = {name for name, group in module.parameter_groups().items() if own & {id(p) for p in group}}
    for number, phase in enumerate(module.recipe.phases):
        if learning & phase.lrs.keys():
            raise InputError(f"feature_cache: phases[{number}].lrs must not train the backbone")
        if "backbone" not in phase.eval_modules:
            raise InputError(f"feature_cache: phases[{number}].eval_modules must name backbone, whose statistics stay")
