"""Plugins: files and packages of users that register their own methods.

A config names them, or installed packages declare them by an entry point. A checkpoint never causes an import.
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
"""Group of entry points of installed packages; the value of each is the module to import."""


def import_plugins(plugins: Sequence[str]) -> None:
    """Import plugins, once each.

    A file is imported as a module of the same name, and its folder is added to `sys.path`. So the file can import its
    neighbours, and processes that load images find it. Relative paths start at the working folder. A missing file is
    skipped if one of the same name was imported before, so that a run finds a plugin that has moved.

    Args:
        plugins: files (`methods/mine.py`), folders with an `__init__.py`, or installed packages (`my_package`).

    Raises:
        InputError: if a plugin is missing, cannot be imported, or has the name of another module.
    """
    for plugin in plugins:
        path = plugin_path(plugin, Path())
        if path is None:
            _import(plugin, plugin)
        else:
            _import_file(plugin, path.resolve())


def plugin_path(plugin: str, folder: Path) -> Path | None:
    """The path of a plugin that is a file or folder, relative to `folder`; None for an installed package."""
    path = folder / os.path.expanduser(plugin)
    if plugin.endswith(".py") or os.sep in plugin or (path / "__init__.py").is_file():
        return path
    return None


def located(plugins: Iterable[str], folder: Path) -> list[str]:
    """Make the paths of plugins absolute; relative ones start at `folder`."""
    paths = [(plugin, plugin_path(plugin, folder)) for plugin in plugins]
    return [plugin if path is None else str(path.absolute()) for plugin, path in paths]


_files: dict[str, Path] = {}
"""Imported plugin files by the name of their module."""


def imported() -> list[Path]:
    """The plugin files that were imported in this process."""
    return list(_files.values())


@functools.cache
def installed() -> dict[str, str]:
    """The plugins of installed packages: names of the packages by module."""
    from importlib import metadata  # slow: it looks through all installed packages

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
            _importing.append(module)  # the module may itself ask a registry for names, which calls this again
            try:
                _import(module, f"{module} of the installed package {package}")
            finally:
                _importing.remove(module)


def _import_file(plugin: str, path: Path) -> None:
    file = path / "__init__.py" if path.is_dir() else path
    name = path.stem if file == path else path.name
    if (before := _files.get(name)) is not None and before != file:
        if not file.is_file() or file.read_bytes() == before.read_bytes():
            return  # the file of a run from another machine or folder: the one imported before replaces it
        raise InputError(f"plugin {plugin}: {before} is in use and has the same name but other contents; rename one")
    if not file.is_file():
        raise InputError(
            f"plugin {plugin}: {file} does not exist; if it has moved, give its new place by plugins=[FILE]"
        )
    if not name.isidentifier():
        raise InputError(f"plugin {plugin}: {name!r} cannot name a Python module; use letters, digits and _")
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, so that it hides no other module
    found = getattr(sys.modules[name], "__file__", None) if name in sys.modules else _origin(name)
    if found is None or Path(found).resolve() != file:
        raise InputError(
            f"plugin {plugin}: another module has the name {name} ({found or 'of Python'}); rename the file"
        )
    _import(name, plugin)
    _files[name] = file


def _origin(name: str) -> str | None:
    importlib.invalidate_caches()  # the file may be newer than Python's listing of its folder
    spec = importlib.util.find_spec(name)
    return spec.origin if spec else None


def _import(module: str, shown: str) -> None:
    """Import a module; an error in it becomes a one-line `InputError` with the place."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise InputError(
                f"plugin {shown}: no package of this name is installed; give a file with its ending, {module}.py"
            ) from None
        raise InputError(f"plugin {shown}: {line_of(error)}") from error
    except InputError as error:
        raise InputError(f"plugin {shown}: {error}") from error
    except Exception as error:  # the user's code can raise any error
        raise InputError(f"plugin {shown}: {line_of(error)}") from error


def line_of(error: BaseException, file: str = "") -> str:
    """An error of a plugin as one line, such as `mine.py line 3: NameError: name 'x' is not defined`.

    Args:
        error: the error.
        file: file whose line is named, if the error passed through it; else the innermost line.
    """
    if isinstance(error, SyntaxError):
        where = f"{Path(error.filename or '').name} line {error.lineno}: "
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
        own = [place for place, frame in enumerate(frames) if frame.filename == file]
        frames = frames[: own[-1] + 1] if own else frames
        where = f"{Path(frames[-1].filename).name} line {frames[-1].lineno}: " if len(frames) > 1 else ""
    name = type(error).__name__
    return f"{where}{name}: {first_line(error).removeprefix(f'{name}: ')}"
