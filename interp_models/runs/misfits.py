"""Find all keys of a config that the chosen model does not have, and report them in one message."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from interp_models.core.errors import InputError, Misfit, unfit
from interp_models.core.schema import schema_of
from interp_models.runs.config import TrainConfig
from interp_models.training.module import MODELS
from interp_models.training.recipe import Recipe


def check_fits(config: TrainConfig, name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a model does not take.

    If there are such options, the message also names the parameter groups, modules and actions of the phases that the
    model does not have. This happens if `model.name` alone is changed in a config.

    Args:
        config: a config with phases and optimizer.
        name: name of the model.
        options: options of the model, as given.

    Raises:
        InputError: one error for all of them; it lists the valid names.
    """
    takes = [field.name for field in dataclasses.fields(schema_of(MODELS.get(name), given=("num_classes",)))]
    found: list[Misfit] = [(f"key in model {name!r}:", key, takes) for key in options if key not in takes]
    if not found:
        return
    known = {key: value for key, value in options.items() if key in takes}
    random: dict[str, Any] = {"weights": None} if "weights" in takes else {}
    wrong = ""
    try:
        model = MODELS.build(name, {**known, **random}, num_classes=2)
    except InputError as error:
        wrong = f"; {error}"
        model = MODELS.build(name, random, num_classes=2)
    modules = [module for module, _ in model.named_modules() if module]
    found += Recipe(config.phases, config.optimizer).misfits(list(model.parameter_groups()), modules, model.actions)
    raise InputError(f"{unfit(found)}{wrong}")
