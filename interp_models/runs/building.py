"""Build the data module and the model of a config."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_models.core.errors import InputError
from interp_models.core.plugins import import_plugins, located
from interp_models.core.registry import named
from interp_models.core.schema import parse, schema_of
from interp_models.core.written import OptionsOf, text_of, typed
from interp_models.data.base import DATASETS
from interp_models.data.module import DataModule
from interp_models.data.transforms import transform_options
from interp_models.runs.config import TrainConfig
from interp_models.runs.misfits import check_fits
from interp_models.training.distillation import Distillation
from interp_models.training.module import MODELS, InterpModule
from interp_models.training.recipe import Recipe
from interp_models.training.tasks import Task


def resolve(config: TrainConfig) -> TrainConfig:
    """Write out all defaults of the data set, the data module and the model, so that the config means the same later.

    The config's plugins are imported first. Their paths become absolute.

    Returns:
        A new config; the one passed in does not change.

    Raises:
        InputError: for an unknown name or option, or a wrong type.
    """
    plugins = located(config.plugins, Path())
    import_plugins(plugins)
    data = data_options(vars(config))
    name, options = named(config.model, "model", MODELS)
    check_fits(config, name, options)
    model = {"name": name, **MODELS.options(name, options, given=("num_classes",))}
    return dataclasses.replace(config, plugins=plugins, data=data, model=model)


def build_model(
    config: Mapping[str, Any],
    num_classes: int,
    *,
    trained: bool = False,
    classes: Sequence[str] = (),
    images: Mapping[str, list[Any]] | None = None,
    distillation: Distillation | None = None,
    task: Task = "classes",
) -> InterpModule:
    """Build the model of a config, with its recipe and the facts that it records about its training.

    Args:
        config: a resolved config.
        num_classes: number of classes of the data set.
        trained: whether weights follow from a checkpoint, so that pretrained ones are not loaded.
        classes: class names by label, for a model from a run.
        images: digests of the training and validation images, as `resume.images_of` returns them.
        distillation: the teacher and its weight in the loss, for a training that has one.
        task: `classes`, or `labels` for images with several labels.

    Raises:
        InputError: for an unknown model or option, a wrong type, or a model that cannot learn the task.
    """
    name, options = named(config["model"], "model", MODELS)
    if trained and "weights" in options:
        options["weights"] = None
    model = MODELS.build(name, options, num_classes=num_classes)
    model.learn(task)
    model.recipe = Recipe(**parse(Recipe, {key: config[key] for key in ("phases", "optimizer")}, "config"))
    model.config = dict(config)
    model.classes, model.images, model.distillation = tuple(classes), dict(images or {}), distillation
    model.check_recipe()
    return model


def build_data(config: Mapping[str, Any], **changes: Any) -> DataModule:
    """Build the data module of a config.

    Args:
        config: a config with `data`, and optionally `seed`.
        **changes: options of the data module that replace those of the config. A mapping `dataset` replaces single
            options of the data set; if it names another data set than the config, it has all options.
    """
    return DataModule(**data_options(config, **changes))


def data_options(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """All options of the data module, with defaults; `dataset` holds those of the data set. For the arguments see
    `build_data`."""
    options = {**config["data"], **{key: value for key, value in changes.items() if key != "dataset"}}
    dataset = typed(OptionsOf, options.get("dataset", {}))
    if not isinstance(dataset, Mapping):
        raise InputError(f"data.dataset: expected keys and values (name and options), got {dataset!r}")
    changed = changes.get("dataset", {})
    if text_of(changed.get("name", dataset.get("name"))) != text_of(dataset.get("name")):
        dataset = {}  # its options are those of another data set
    name, of_dataset = named({**dataset, **changed}, "data.dataset", DATASETS)
    options["dataset"] = {"name": name, **DATASETS.options(name, of_dataset, given=("split",))}
    options.setdefault("seed", int(config.get("seed", 0)))
    parsed = parse(schema_of(DataModule), options, "data")
    return {**parsed, "transforms": transform_options(parsed["transforms"])}
