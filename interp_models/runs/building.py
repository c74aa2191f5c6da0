"""Data module and model of a config."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_models.core.errors import InputError
from interp_models.core.plugins import import_plugins, located
from interp_models.core.registry import named
from interp_models.core.schema import parse, schema_of
from interp_models.core.written import OptionsOf, typed
from interp_models.data.base import DATASETS
from interp_models.data.module import DataModule
from interp_models.data.transforms import transform_options
from interp_models.runs.config import TrainConfig
from interp_models.runs.misfits import check_fits
from interp_models.training.distillation import Distillation
from interp_models.training.module import MODELS, InterpModule
from interp_models.training.recipe import Recipe


def resolve(config: TrainConfig) -> TrainConfig:
    """The config with all defaults of data set, data module and model written out, so that it means the same later.

    Its plugins are imported first, and get absolute paths.

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
) -> InterpModule:
    """The model of a config, with its recipe and all else that it keeps of its training.

    Args:
        config: a resolved config.
        num_classes: of the data set.
        trained: leaves the pretrained weights out, as a checkpoint follows.
        classes: names by label, of a model from a run.
        images: what tells the images that it is trained on from others.
        distillation: the teacher, of a training that has one.

    Raises:
        InputError: for an unknown model, option or a wrong type.
    """
    name, options = named(config["model"], "model", MODELS)
    if trained:
        options["weights"] = None
    model = MODELS.build(name, options, num_classes=num_classes)
    model.recipe = Recipe(**parse(Recipe, {key: config[key] for key in ("phases", "optimizer")}, "config"))
    model.config = dict(config)
    model.classes, model.images, model.distillation = tuple(classes), dict(images or {}), distillation
    model.check_recipe()
    return model


def build_data(config: Mapping[str, Any], **changes: Any) -> DataModule:
    """The data module of a config, with changed options of the data module or, in `dataset`, of its data set."""
    return DataModule(**data_options(config, **changes))


def data_options(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The options of the data module, those of the data set in `dataset`, with all defaults; see `build_data`."""
    options = {**config["data"], **{key: value for key, value in changes.items() if key != "dataset"}}
    dataset = typed(OptionsOf, options.get("dataset", {}))
    if not isinstance(dataset, Mapping):
        raise InputError(f"data.dataset: expected keys and values (name and options), got {dataset!r}")
    name, of_dataset = named({**dataset, **changes.get("dataset", {})}, "data.dataset", DATASETS)
    options["dataset"] = {"name": name, **DATASETS.options(name, of_dataset, given=("split",))}
    options.setdefault("seed", int(config.get("seed", 0)))
    parsed = parse(schema_of(DataModule), options, "data")
    return {**parsed, "transforms": transform_options(parsed["transforms"])}
