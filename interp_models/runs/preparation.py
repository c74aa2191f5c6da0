"""Build the data module and the model of a training, and check them before anything is written."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from interp_models.core.errors import InputError, first_line
from interp_models.core.modes import evaluating
from interp_models.core.outputs import has_labels
from interp_models.data.module import DataModule
from interp_models.data.transforms import TRANSFORMS
from interp_models.nn.backbone import Backbone
from interp_models.runs.building import build_data, build_model
from interp_models.runs.config import TrainConfig
from interp_models.runs.loading import load, run_config
from interp_models.runs.resume import Resumed, check_same_classes, images_to_train_on
from interp_models.training.distillation import Distillation
from interp_models.training.feature_cache import phases_on_features
from interp_models.training.module import InterpModule
from interp_models.training.schedule import check_strategy
from interp_models.training.tasks import Task
from interp_models.training.trainer import check_data


def prepare(
    config: TrainConfig,
    node: Mapping[str, Any],
    options: Mapping[str, Any],
    trial: pl.Trainer,
    resumed: Resumed | None,
) -> tuple[DataModule, InterpModule]:
    """Build and check the data module and the model of a training.

    Args:
        config: the resolved config.
        node: the same config as plain containers; the model keeps it.
        options: options of the trainer.
        trial: an unused trainer with these options.
        resumed: the checkpoint of a resumed training.

    Raises:
        InputError: if a step of the training would fail later, or would be silently wrong.
    """
    devices = trial.world_size
    data = build_data(node)
    data.check_training(devices)
    check_limits(options, data, devices)
    images = images_to_train_on(data, resumed)
    with torch.random.fork_rng(devices=[]):  # a student's initial weights must not depend on its teacher
        distillation = build_distillation(config, data)
    trained = resumed is not None
    task: Task = "labels" if data.multilabel else "classes"
    model = build_model(node, len(data.classes), trained=trained, images=images, distillation=distillation, task=task)
    model.check_selection(selecting=len(data.val_indices) > 0)
    model.recipe.check_timeline()
    check_features(config, model)
    check_strategy(trial.strategy, model)
    check_images(model, data, devices, synced=bool(options.get("sync_batchnorm")))
    check_data(data, model)
    return data, model


def check_limits(options: Mapping[str, Any], data: DataModule, devices: int) -> None:
    """Raise `InputError` if a fraction in `limit_<split>_batches` rounds to no batch at all."""
    for split, indices in (("train", data.train_indices), ("val", data.val_indices), ("test", data.test_indices)):
        limit, batches = options.get(f"limit_{split}_batches"), -(-len(indices) // (data.batch_size * devices))
        if isinstance(limit, float) and limit < 1 and batches and int(batches * limit) == 0:
            raise InputError(
                f"trainer.limit_{split}_batches={limit} of {batches} batches is none; at least one is needed"
            )


def check_images(model: InterpModule, data: DataModule, devices: int, *, synced: bool = False) -> None:
    """Raise `InputError` if the model cannot take images of this size, in the test or in a training step of a phase.

    Batch norms in train mode need at least two values per channel: two images, or a map of two cells. A copy of the
    model is tried, so that no weight, statistic or random state changes.

    Args:
        model: the model, with its recipe.
        data: image size, batch size and number of training images.
        devices: number of devices that share the training images.
        synced: whether batch norms see the images of all devices.
    """
    size, name = data.image_size, type(model).__name__
    try:
        with torch.no_grad(), evaluating(model):
            output = model(torch.zeros(1, 3, size, size))
        if has_labels(output) != (model.task == "labels"):
            raise InputError(f"{name}: forward must make its output by self.output(...) to learn several labels")
    except InputError:
        raise
    except Exception as error:  # models of timm raise errors of many types
        raise InputError(f"data.image_size={size}: {name} cannot take such images ({first_line(error)})") from None
    count = min(data.batch_size, -(-len(data.train_indices) // devices))
    seen = min(2, count * devices if synced else count)
    tried = copy.deepcopy(model)
    for number, phase in enumerate(model.recipe.phases):
        if not phase.epochs:
            continue
        phase.set_modes(tried)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                tried.loss(tried(torch.zeros(seen, 3, size, size)), _no_targets(tried, seen))
        except InputError:
            raise
        except Exception as error:
            advice = "; take more images per step, larger images, or eval_modules that hold its batch norms"
            raise InputError(
                f"phases[{number}]: {name} cannot be trained by steps of {count} image{'s' * (count > 1)} per device "
                f"at data.image_size={size} ({first_line(error)}){advice if seen == 1 else ''}"
            ) from None


def _no_targets(model: InterpModule, count: int) -> torch.Tensor:
    """Targets of the model's task: the class 0 for every image, or no label."""
    if model.task == "classes":
        return torch.zeros(count, dtype=torch.long)
    return torch.zeros(count, model.num_classes, dtype=torch.bool)


def build_distillation(config: TrainConfig, data: DataModule) -> Distillation | None:
    """Load the teacher of a training; None if the config names none.

    Raises:
        InputError: if the teacher is not a run, or was trained with other classes, another image size or another crop;
            and if images have several labels.
    """
    path = config.distillation.teacher
    if path is None:
        return None
    if data.multilabel:
        raise InputError("distillation.teacher: needs one class per image; the images have several labels")
    try:
        teacher, _ = load(path)
    except InputError as error:
        raise InputError(f"distillation.teacher: {error}") from None
    if teacher.task != "classes":
        raise InputError(f"distillation.teacher: {path} was trained for several labels per image, the images have one")
    check_same_classes(teacher.classes or data.classes, data.classes, f"distillation.teacher: {path}")
    if teacher.num_classes != len(data.classes):
        raise InputError(
            f"distillation.teacher: {path} knows {teacher.num_classes} classes, the data set has {len(data.classes)}"
        )
    of_teacher = run_config(Path(path))["data"]
    for key in ("image_size", "crop_to_box"):
        if of_teacher.get(key) not in (None, config.data[key]):
            raise InputError(f"distillation.teacher: {path} has data.{key}={of_teacher[key]}, not {config.data[key]}")
    return Distillation(teacher, temperature=config.distillation.temperature, weight=config.distillation.weight)


def check_features(config: TrainConfig, module: InterpModule) -> None:
    """Raise `InputError` if the config asks for cached features and the training needs images, or changes the backbone
    from the start.

    Distillation and metrics of maps need images.
    """
    if config.feature_copies < 0:
        raise InputError(f"feature_copies must be 0 or more; got {config.feature_copies}")
    if config.feature_cache is None:
        if config.feature_copies:
            raise InputError("feature_copies needs feature_cache, the folder of the features")
        return
    if config.data["augment"] != bool(config.feature_copies):
        raise InputError(
            "feature_cache needs data.augment=false, or feature_copies: the number of augmented copies of each image"
            if config.data["augment"]
            else "feature_copies needs data.augment=true"
        )
    transform = config.data["transforms"]["name"]
    crops = TRANSFORMS.get(transform).crops_training_images and not config.data["crop_to_box"]
    if crops and not config.feature_copies and config.data["val_fraction"]:
        raise InputError(
            f"feature_cache: data.transforms={transform} crops training images only; add data.crop_to_box=true"
        )
    if module.distillation is not None:
        raise InputError("feature_cache: distillation.teacher needs images, not features")
    if config.evaluation.every_n_epochs:
        raise InputError("feature_cache: evaluation.every_n_epochs needs images, not features")
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise InputError(f"feature_cache: {type(module).__name__} has no backbone whose features could be cached")
    if not phases_on_features(module):
        raise InputError(
            "feature_cache: phases[0].lrs must not train the backbone"
            if "backbone" in module.recipe.phases[0].eval_modules
            else "feature_cache: phases[0].eval_modules must name backbone, whose statistics stay"
        )
