"""Registries of classes by name. The typed constructor of a class is the schema of its options."""

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
    """Classes of one kind by name. It iterates over the names and prints them.

    The files of a package register their classes. Files are imported when they are needed: `get` and `build` import
    the file of the class only; methods that list names import all files and the plugins of installed packages.

    Args:
        kind: kind of class, such as `explainer`, for messages.
        home: place of the registry, `package.VARIABLE`; all files of the package belong to it. Without it, only classes
            that are already imported are found.

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
        """Class decorator that registers a class under `name`.

        A class of `__main__`, such as one in a notebook, may be defined again.

        Raises:
            InputError: if another class of this registry has the same name, or the same class name.
        """

        def enter(cls: C) -> C:
            taken = [(one, other.__name__, other.__module__) for one, other in self._known.items() if other is not cls]
            taken = [one for one in taken if one[1:] != (cls.__name__, "__main__") or cls.__module__ != "__main__"]
            if not f"{cls.__module__}.".startswith(f"{self._package}."):  # the package may not be imported yet
                taken += [(entry.name, entry.cls, entry.module) for entry in self._entries()]
            for other, class_name, module in taken:
                if other == name:
                    raise InputError(f"{self.kind} {name!r} is already registered by {module}; choose another name")
                if class_name == cls.__name__:
                    raise InputError(
                        f"{self.kind} {name!r}: {module} also registers a class {class_name}; rename it, because "
                        "classes are exported by their names"
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
        """All registered classes, with those of installed plugins."""
        if self._package and not self._complete:
            self._complete = True  # set before: an imported file may itself ask for names
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
        """Aliases that `get` and `build` accept: the registered name by alias. There are none by default."""
        return {}

    def names(self, pattern: str = "*") -> list[str]:
        """The registered names that match a shell-style pattern, sorted."""
        return sorted(fnmatch.filter(self._classes(), pattern))

    def get(self, name: str) -> Any:
        """The class registered under `name`, or under an alias of it.

        Raises:
            InputError: for an unknown name, with the nearest known ones.
        """
        if (cls := self._find(name)) is not None:
            return cls
        aliases = self.aliases()
        if name not in aliases:
            raise unknown(self.kind, name, [*self._known, *aliases])
        return self._known[aliases[name]]

    def options(self, name: str, options: Mapping[str, Any], given: typing.Collection[str] = ()) -> dict[str, Any]:
        """Check options without building anything.

        Args:
            name: registered name or alias.
            options: options from a config.
            given: names of constructor parameters that the program passes itself; they are not options.

        Returns:
            All options, with defaults.

        Raises:
            InputError: for an unknown name or option, or a wrong type.
        """
        return parse(schema_of(self.get(name), given), options, f"{self.kind} {name!r}")

    def build(self, name: str, options: Mapping[str, Any] | None = None, **given: Any) -> T:
        """Build an object.

        Args:
            name: registered name or alias.
            options: options from a config, checked against the typed constructor of the class.
            **given: further arguments of the constructor, such as `model`.

        Raises:
            InputError: for an unknown name or option, or a wrong type.
        """
        cls = self.get(name)
        if not isinstance(options, Mapping | None):
            raise InputError(f"options of {self.kind} {name!r} must be a mapping; got {type(options).__name__}")
        return cls(**given, **parse(schema_of(cls, given), options or {}, f"{self.kind} {name!r}"))  # type: ignore[no-any-return]


def named(node: Mapping[str, Any], where: str, registry: Registry[Any]) -> tuple[str, dict[str, Any]]:
    """Split a config node into its `name` and its options; raises `InputError` if it has no name."""
    if "name" not in node:
        raise InputError(f"{where}.name must be given: one of {', '.join(registry.names())}")
    return text_of(node["name"]), {key: value for key, value in node.items() if key != "name"}
