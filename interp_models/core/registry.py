"""Registries by name, whose entries' typed constructors are their config schemas."""

import fnmatch
import typing
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from interp_models.core.errors import InputError, unknown
from interp_models.core.schema import parse, schema_of
from interp_models.core.written import text_of

T = TypeVar("T")


C = TypeVar("C", bound=type)


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
