"""Find the registered classes of a package, by reading its source or by importing it."""

import ast
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A registered class as written in its file: `@METRICS.register("purity") class Purity`."""

    registry: str
    """Name of the registry's variable."""
    name: str
    """Name under which the class is registered."""
    cls: str
    """Name of the class."""
    module: str
    """Dotted name of its module."""
    keys: tuple[str, ...] = ()
    """Its `keys`, if the class has a literal tuple of names, as metrics do."""


@functools.cache
def registered(package: str) -> tuple[Entry, ...]:
    """The classes that files below a package register. The source is read, not imported.

    Only decorators with a literal name are found; `import_all` finds all classes.

    >>> [entry.cls for entry in registered("interp_models.explainers") if entry.name == "gradcam"]
    ['GradCAM']
    """
    return tuple(
        entry
        for folder in folders(package)
        for path in sorted(folder.rglob("*.py"))
        for entry in _entries(path, ".".join([package, *path.relative_to(folder).with_suffix("").parts]))
    )


def folders(package: str) -> list[Path]:
    """The folders of a package's files. Only the top-level package may be imported by this, not the package itself."""
    first, *inner = package.split(".")
    spec = importlib.util.find_spec(first)
    places = [Path(folder, *inner) for folder in (spec.submodule_search_locations or [] if spec else [])]
    return [place for place in places if place.is_dir()]


def _entries(path: Path, module: str) -> Iterable[Entry]:
    source = path.read_text(encoding="utf-8")
    if ".register(" not in source:
        return
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        for call in node.decorator_list:
            match call:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id=registry), attr="register"),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    yield Entry(registry, name, node.name, module.removesuffix(".__init__"), tuple(_keys(node)))


def _keys(node: ast.ClassDef | ast.FunctionDef) -> Iterable[str]:
    """The names in `keys = ("a", "b")` of a class."""
    for line in node.body:
        match line:
            case ast.Assign(targets=[ast.Name(id="keys")], value=ast.Tuple(elts=names)):
                yield from (str(name.value) for name in names if isinstance(name, ast.Constant))


def import_all(package: str) -> None:
    """Import all modules directly inside `package`, so that their classes are registered."""
    for module in pkgutil.iter_modules(map(str, folders(package))):
        importlib.import_module(f"{package}.{module.name}")


def exported(package: str, name: str) -> Any:
    """Look up a registered class or a module of a package by its name; a package's `__getattr__` calls it.

    Raises:
        AttributeError: if there is no class and no module of this name.
    """
    for entry in registered(package):
        if entry.cls == name:
            return getattr(importlib.import_module(entry.module), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
        return importlib.import_module(f"{package}.{name}")
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def public_names(package: str, own: Iterable[str]) -> list[str]:
    """The names for `__all__`: the package's `own` and every registered class."""
    return sorted({*own, *(entry.cls for entry in registered(package))})
