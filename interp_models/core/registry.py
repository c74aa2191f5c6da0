"""Registries by name, whose entries' typed constructors are their config schemas."""

import fnmatch
import importlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from interp_models.core.discovery import Entry, import_all, registered
from interp_models.core.errors import InputError, unknown
from interp_models.core.plugins import import_installed
from interp_models.core.schema import parse, schema_of
from interp_models.core.written import text_of

T = TypeVar("T")


C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Named classes of one kind: iterates over their names, and prints them.

    The files of a package register its classes. They are imported when they are needed: by `get` and `build` the file
    of the class alone, by all that lists names every file, and the plugins of installed packages.

    Args:
        kind: begins messages, such as `explainer`.
        home: where the registry is found, `package.VARIABLE`; the files of the package register its classes. Without
            one, classes are registered by whoever imports them.

    >>> SHAPES = Registry("shape")
    >>> @SHAPES.register("square")
    ... class Square:
    ...     def __init__(self, side: float = 1.0): self.side = side
    >>> SHAPES.build("square", {"side": 2}).side
    2.0
    """

    def __init__(self, kind: str, home: str = "") -> None:
        self.kind = kind
        self._package, _, self._variable = home.rpartition(".")
        self._known: dict[str, type] = {}
        self._complete = False
        """Whether all files of the package are imported, or being imported."""

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that enters a class under `name`.

        A class of `__main__`, such as a notebook's, may be defined again.

        Raises:
            InputError: if the name, or the name of the class, is that of another class of this registry.
        """

        def enter(cls: C) -> C:
            taken = [(one, other.__name__, other.__module__) for one, other in self._known.items() if other is not cls]
            taken = [one for one in taken if one[1:] != (cls.__name__, "__main__") or cls.__module__ != "__main__"]
            if not f"{cls.__module__}.".startswith(f"{self._package}."):  # the package may not be whole yet
                taken += [(entry.name, entry.cls, entry.module) for entry in self._entries()]
            for other, class_name, module in taken:
                if other == name:
                    raise InputError(f"{self.kind} {name!r} is already registered by {module}; choose another name")
                if class_name == cls.__name__:
                    raise InputError(
                        f"{self.kind} {name!r}: {module} registers a class {class_name} too; give it another name, as "
                        "classes are exported by theirs"
                    )
            self._known[name] = cls
            return cls

        return enter

    def _entries(self) -> list[Entry]:
        """The classes that the package's files register here."""
        if not self._package:
            return []
        return [entry for entry in registered(self._package) if entry.registry == self._variable]

    def _classes(self) -> dict[str, type]:
        """Every registered class, those of installed plugins included."""
        if self._package and not self._complete:
            self._complete = True  # a file may ask for names
            try:
                import_all(self._package)
            except BaseException:
                self._complete = False
                raise
        import_installed()
        return self._known

    def _find(self, name: str) -> type | None:
        """The class registered under `name`, with no more imports than it needs."""
        if name not in self._known:
            for entry in self._entries():
                if entry.name == name:
                    importlib.import_module(entry.module)
        return self._known.get(name) or self._classes().get(name)

    def __repr__(self) -> str:
        return f"<{self.kind} registry: {', '.join(self)}>"

    def __iter__(self) -> typing.Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._classes())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._find(name) is not None or name in self.aliases())

    def aliases(self) -> Mapping[str, str]:
        """Aliases that `get` and `build` accept, and the registered names behind them; none by default."""
        return {}

    def names(self, pattern: str = "*") -> list[str]:
        """The registered names that match a shell-style pattern, sorted."""
        return sorted(fnmatch.filter(self._classes(), pattern))

    def get(self, name: str) -> Any:
        """The class registered under `name` or an alias of it; an unknown one raises `InputError` with the nearest."""
        if (cls := self._find(name)) is not None:
            return cls
        aliases = self.aliases()
        if name not in aliases:
            raise unknown(self.kind, name, [*self._known, *aliases])
        return self._known[aliases[name]]

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
