"""Schemas of configs, made from the typed parameters of constructors."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from interp_models.core.errors import InputError, Misfit, first_line, unfit
from interp_models.core.written import is_open, typed, values

MISSING = "???"
"""OmegaConf's mark for a value without a default."""


def schema_of(cls: Callable[..., Any], given: typing.Collection[str] = ()) -> type:
    """Make a dataclass of the typed keyword parameters of `cls`, without those that the program passes (`given`)."""
    constructor = vars(cls).get("__init__") or getattr(cls, "__init__", cls)
    hints = typing.get_type_hints(constructor if isinstance(cls, type) else cls, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name in given or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = MISSING if parameter.default is parameter.empty else parameter.default
        if isinstance(default, tuple):
            default = list(default)
        field: Any = dataclasses.field(default_factory=functools.partial(_same, default))
        fields.append((parameter.name, hints.get(parameter.name, Any), field))
    return dataclasses.make_dataclass(f"{getattr(cls, '__name__', 'Config')}Options", fields)


def _same(value: Any) -> Any:
    return value


def parse(schema: type, node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config node against a dataclass.

    Args:
        schema: the dataclass.
        node: keys and values as written.
        where: the node's key in the whole config, for messages.

    Returns:
        The value of every field, with defaults.

    Raises:
        InputError: for unknown keys (with the nearest known one), a wrong type or a missing value.
    """
    from omegaconf import OmegaConf  # not needed for explainers and metrics that are built in Python
    from omegaconf.errors import OmegaConfBaseException

    names = [field.name for field in dataclasses.fields(schema)]
    strange: list[Misfit] = [(f"key in {where}:", key, names) for key in node if key not in names]
    if strange:
        raise unfit(strange)
    hints = typing.get_type_hints(schema)
    marked = typing.get_type_hints(schema, include_extras=True)
    checked, nested = {}, {}
    for key, value in node.items():
        hint = hints[key]
        try:
            value = typed(marked[key], value)
        except InputError as error:
            raise InputError(f"{where}.{key}: {error}") from None
        if typing.get_origin(hint) is list:
            if not isinstance(value, list | tuple):
                raise InputError(f"{where}.{key}: expected a list, got {value!r}")
            (item,) = typing.get_args(hint)
            if dataclasses.is_dataclass(item):
                nested[key] = [_nested(item, one, f"{where}.{key}[{i}]") for i, one in enumerate(value)]
                continue
        elif dataclasses.is_dataclass(hint):
            nested[key] = _nested(hint, value, f"{where}.{key}")
            continue
        if hint is Any and callable(value):
            nested[key] = value
            continue
        if is_open(marked[key]):
            nested[key] = value
            value = {} if isinstance(value, Mapping) else [] if isinstance(value, list) else value
        checked[key] = values(value)
    merged: Any = OmegaConf.structured(schema)
    for key, value in checked.items():
        try:
            merged = OmegaConf.merge(merged, {key: value})
        except TypeError:  # a list where keys are expected
            raise InputError(f"{where}.{key}: expected {hints[key]}, got {value!r}") from None
        except OmegaConfBaseException as error:
            if not error.full_key:  # OmegaConf does not name the key of tuples
                raise InputError(f"{where}.{key}: expected {hints[key]}, got {value!r}") from None
            raise InputError(f"{where}.{error.full_key}: {first_line(error)}") from None
    missing = sorted(key for key in OmegaConf.missing_keys(merged) if key not in nested)
    if missing:
        raise InputError(f"{where}: {missing[0]!r} has no default and must be given")
    for name in names:
        value = nested[name] if name in nested else merged[name]
        checked[name] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    return {name: checked[name] for name in names}


def _nested(schema: Any, value: Any, where: str) -> Any:
    """Check a field that is itself a dataclass; errors name the key in the whole config."""
    if isinstance(value, schema):
        return value
    if not isinstance(value, Mapping):
        names = ", ".join(field.name for field in dataclasses.fields(schema))
        raise InputError(f"{where}: expected keys and values ({names}), got {value!r}")
    return schema(**parse(schema, value, where))
