"""Code of users that registers itself: files and packages that a config names, and installed packages.

No plugin is imported because a checkpoint names it.
"""

import functools
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

from interp_models.core.errors import InputError, first_line

GROUP = "interp_models.plugins"
"""Entry points of installed packages: the value is the module to import."""


def import_plugins(plugins: Sequence[str]) -> None:
    """Import files (`methods/mine.py`), folders with an `__init__.py` and installed packages (`my_package`), once each.

    A file is a module of its own name, and its folder is added to `sys.path`: it can import what lies beside it, and
    processes that load images find it. Relative files are looked for in the working folder. A file that is missing is
    passed over if one of the same name was imported before, so that a run finds a plugin that has moved.

    Raises:
        InputError: if one is missing or cannot be imported, or has the name of another module.
    """
    for plugin in plugins:
        path = plugin_path(plugin, Path())
        if path is None:
            _import(plugin, plugin)
        else:
            _import_file(plugin, path.resolve())


def plugin_path(plugin: str, folder: Path) -> Path | None:
    """The file or folder that a plugin is, relative ones below `folder`; None for a package that is to be installed."""
    path = folder / os.path.expanduser(plugin)
    if plugin.endswith(".py") or os.sep in plugin or (path / "__init__.py").is_file():
        return path
    return None


def located(plugins: Iterable[str], folder: Path) -> list[str]:
    """Plugins with absolute paths, relative ones being below `folder`, so that they mean the same from anywhere."""
    paths = [(plugin, plugin_path(plugin, folder)) for plugin in plugins]
    return [plugin if path is None else str(path.absolute()) for plugin, path in paths]


_files: dict[str, Path] = {}
"""The files that were imported, by the name of the module."""


def imported() -> list[Path]:
    """The plugin files that were imported in this process."""
    return list(_files.values())


@functools.cache
def installed() -> dict[str, str]:
    """The plugins of installed packages: the module of each and the package's name."""
    from importlib import metadata  # looks through all installed packages

    points = metadata.entry_points(group=GROUP)
    return {point.value.partition(":")[0].strip(): point.dist.name if point.dist else point.name for point in points}


_importing: list[str] = []


def import_installed() -> None:
    """Import the plugins of installed packages, once.

    Raises:
        InputError: if one cannot be imported.
    """
    for module, package in installed().items():
        if module not in sys.modules and module not in _importing:
            _importing.append(module)  # it may ask a registry for its names
            try:
                _import(module, f"{module} of the installed package {package}")
            finally:
                _importing.remove(module)


def _import_file(plugin: str, path: Path) -> None:
    file = path / "__init__.py" if path.is_dir() else path
    name = path.stem if file == path else path.name
    if (before := _files.get(name)) is not None and before != file:
        if not file.is_file() or file.read_bytes() == before.read_bytes():
            return  # a run of another machine or folder: the given file replaces it
        raise InputError(f"plugin {plugin}: {before} is in use, which has the same name and other contents; rename one")
    if not file.is_file():
        raise InputError(f"plugin {plugin}: {file} does not exist; plugins=[FILE] names it where it is now")
    if not name.isidentifier():
        raise InputError(f"plugin {plugin}: {name!r} is no name of a Python module; use letters, digits and _")
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that it hides nothing
    found = getattr(sys.modules[name], "__file__", None) if name in sys.modules else _origin(name)
    if found is None or Path(found).resolve() != file:
        raise InputError(f"plugin {plugin}: another module is called {name} ({found or 'of Python'}); rename the file")
    _import(name, plugin)
    _files[name] = file


def _origin(name: str) -> str | None:
    importlib.invalidate_caches()  # the file may be newer than Python's listing of its folder
    spec = importlib.util.find_spec(name)
    return spec.origin if spec else None


def _import(module: str, shown: str) -> None:
    """Import a module; an error in it becomes one line that says where."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise InputError(
                f"plugin {shown}: no package of this name is installed; a file is written with its ending, {module}.py"
            ) from None
        raise InputError(f"plugin {shown}: {_line(error)}") from error
    except InputError as error:
        raise InputError(f"plugin {shown}: {error}") from error
    except Exception as error:  # user code may raise anything
        raise InputError(f"plugin {shown}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """An error of a plugin with the place where it was raised: `mine.py line 3: NameError: name 'x' is not defined`."""
    if isinstance(error, SyntaxError):
        where = f"{Path(error.filename or '').name} line {error.lineno}: "
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
        where = f"{Path(frames[-1].filename).name} line {frames[-1].lineno}: " if len(frames) > 1 else ""
    name = type(error).__name__
    return f"{where}{name}: {first_line(error).removeprefix(f'{name}: ')}"
