"""Registries by name, whose entries' typed constructors are their config schemas."""

import dataclasses
import difflib
import fnmatch
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from interp_models.errors import InputError, first_line
from interp_models.written import is_open, text_of, typed, values

T = TypeVar("T")
C = TypeVar("C", bound=type)


def unknown(kind: str, name: object, known: typing.Iterable[str]) -> InputError:
    """An error for a name that does not exist, with the nearest ones that do.

    Spellings count as one name: `GradCAM++`, `Grad-CAM-pp` and `gradcam_pp`.
    """
    names = sorted(known)
    by_letters: dict[str, list[str]] = {}
    for one in names:
        by_letters.setdefault(_letters(one), []).append(one)
    near = difflib.get_close_matches(_letters(str(name)), by_letters, n=3)
    same = by_letters.get(_letters(str(name)), [])
    close = same or [one for letters in near for one in by_letters[letters]]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(names)}"
    return InputError(f"unknown {kind} {name!r}; {hint}")


def _letters(name: str) -> str:
    """The letters and digits of a name, small."""
    return "".join(x for x in name.lower().replace("plusplus", "pp").replace("++", "pp") if x.isalnum())


Misfit = tuple[str, object, typing.Sequence[str]]
"""A name that does not exist: its kind, the name, and those that do."""


def unfit(found: typing.Sequence[Misfit]) -> InputError:
    """One error for all names that do not exist."""
    if len(found) == 1:
        return unknown(*found[0])
    parts = []
    for kind, known in dict.fromkeys((kind, tuple(known)) for kind, _, known in found):
        names = [repr(name) for other, name, those in found if (other, tuple(those)) == (kind, known)]
        shown = [name for name in sorted(known) if len(known) <= 30 or "." not in name]  # not all modules of a trunk
        parts.append(f"unknown {kind} {', '.join(names)} (known: {', '.join(shown) or 'none'})")
    return InputError("; ".join(parts))


def schema_of(cls: Callable[..., Any], given: typing.Collection[str] = ()) -> type:
    """A dataclass with the typed keyword parameters of `cls`, except those that are `given` by the program."""
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
    """Check a config node against a dataclass and return its fields as objects.

    Raises:
        InputError: for unknown keys (with the nearest one), a wrong type or a missing value.
    """
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
        if is_open(marked[key]):
            nested[key] = value
            value = {} if isinstance(value, Mapping) else [] if isinstance(value, list) else value
        checked[key] = values(value)
    merged: Any = OmegaConf.structured(schema)
    for key, value in checked.items():
        try:
            merged = OmegaConf.merge(merged, {key: value})
        except TypeError:  # of a list where keys are expected
            raise InputError(f"{where}.{key}: expected {hints[key]}, got {value!r}") from None
        except OmegaConfBaseException as error:
            if not error.full_key:  # of a tuple, for which OmegaConf does not say what is wrong either
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
    """A field that is itself a dataclass, whose errors say where in the whole config they are."""
    if isinstance(value, schema):
        return value
    if not isinstance(value, Mapping):
        names = ", ".join(field.name for field in dataclasses.fields(schema))
        raise InputError(f"{where}: expected keys and values ({names}), got {value!r}")
    return schema(**parse(schema, value, where))


class Registry(Generic[T]):
    """Named classes of one kind: iterates over their names, and prints them.

    >>> SHAPES = Registry("shape")
    >>> @SHAPES.register("square")
    ... class Square:
    ...     def __init__(self, side: float = 1.0): self.side = side
    >>> SHAPES.build("square", {"side": 2}).side
    2.0
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that enters a class under `name`; a name that is taken raises `KeyError`."""

        def enter(cls: C) -> C:
            if name in self._classes:
                raise KeyError(f"{self.kind} {name!r} is already registered by {self._classes[name].__module__}")
            self._classes[name] = cls
            return cls

        return enter

    def __repr__(self) -> str:
        return f"<{self.kind} registry: {', '.join(self)}>"

    def __iter__(self) -> typing.Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._classes)

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in self.aliases()

    def aliases(self) -> Mapping[str, str]:
        """Other names that `get` and `build` take, and the registered ones that they stand for; none by default."""
        return {}

    def names(self, pattern: str = "*") -> list[str]:
        """The registered names that match a shell-style pattern, sorted."""
        return sorted(fnmatch.filter(self._classes, pattern))

    def get(self, name: str) -> Any:
        """The class registered under `name` or an alias of it; an unknown one raises `InputError` with the nearest."""
        if name in self._classes:
            return self._classes[name]
        aliases = self.aliases()
        if name not in aliases:
            raise unknown(self.kind, name, [*self._classes, *aliases])
        return self._classes[aliases[name]]

    def options(self, name: str, options: Mapping[str, Any], given: typing.Collection[str] = ()) -> dict[str, Any]:
        """All options of `name`, defaults included; `InputError` unless it exists and takes these. Builds nothing."""
        return parse(schema_of(self.get(name), given), options, f"{self.kind} {name!r}")

    def build(self, name: str, options: Mapping[str, Any] | None = None, **given: Any) -> T:
        """Construct `name` from config `options`, checked against its constructor, and what the program gives."""
        cls = self.get(name)
        return cls(**given, **parse(schema_of(cls, given), options or {}, f"{self.kind} {name!r}"))  # type: ignore[no-any-return]


def named(node: Mapping[str, Any], where: str, registry: Registry[Any]) -> tuple[str, dict[str, Any]]:
    """The `name` of a config node and its options; `InputError` if it has no name."""
    if "name" not in node:
        raise InputError(f"{where}.name must be given: one of {', '.join(registry.names())}")
    return text_of(node["name"]), {key: value for key, value in node.items() if key != "name"}
