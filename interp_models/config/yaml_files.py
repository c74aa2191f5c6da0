"""Yaml files that extend each other, and command-line overrides. No schema is applied here."""

import copy
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from interp_models.config.shipped import shipped
from interp_models.core.errors import InputError, first_line
from interp_models.core.plugins import located
from interp_models.core.written import Written, expanded, given, read, text_of, value_of, values


def chain(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a yaml file and merge it into the file that it extends.

    The extended file lies beside it or is a shipped config. Values stay as written. Relative paths in `plugins` start
    at the folder of the file and are made absolute.

    Args:
        path: the file.
        above: the files that extend it, directly or through others.

    Raises:
        InputError: if a file is missing or malformed, or extends itself.
    """
    if path.resolve() in [file.resolve() for file in above]:
        raise InputError(f"configs extend each other in a circle: {' -> '.join(map(str, (*above, path)))}")
    node = _read(path, above)
    plugins = node.get("plugins")
    if isinstance(plugins, list) and all(isinstance(plugin, str) for plugin in plugins):
        node["plugins"] = located(map(text_of, plugins), path.parent)
    base = node.pop("extends", None)
    if base is None:
        return node
    if not isinstance(base, str) or not base:
        raise InputError(f"config {path}: extends must be the name of one file; got {values(base)!r}")
    below = path.parent / expanded(base)
    return _merged(chain((not below.exists() and shipped(Path(base))) or below, (*above, path)), node)


def _merged(base: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], value) if isinstance(base.get(key), dict) and isinstance(value, dict) else value
        for key, value in node.items()
    }
    return {**base, **both}


def _read(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        named = f", which {above[-1]} extends," if above else ""
        near = sorted(str(file) for file in path.parent.glob("*.yaml"))
        found = f"found there: {', '.join(near) or 'no yaml file'}"
        raise InputError(f"config {path}{named} does not exist; {found}") from None
    except OSError as error:
        raise InputError(f"config {path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"config {path} cannot be read: {error}; it must be text in UTF-8") from None
    try:
        node = read(text)
        OmegaConf.create(values(node))  # raises for malformed interpolations
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"config {path} is not valid yaml: {' '.join(str(error).split())}") from None
    if node is None or (isinstance(node, Written) and not node):
        return {}
    if not isinstance(node, dict):
        raise InputError(f"config {path} must hold keys and values")
    return node


def overridden(node: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply overrides `key=value` in their order; values stay as written.

    Raises:
        InputError: for a malformed override, a list position that does not exist, or an interpolation that cannot be
            resolved.
    """
    changed = copy.deepcopy(dict(node))
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key:
            raise InputError(f"{assignment!r} is not an override; write key=value, without spaces around =")
        if not value.strip():
            raise InputError(f"{assignment!r} has no value; {key}=null means none, {key}=\"''\" is empty text")
        try:
            _set(changed, key, given(value))
        except (IndexError, ValueError) as error:
            raise InputError(f"override {assignment!r} cannot be applied: {error}") from None
    try:
        # Objects are allowed because OmegaConf does not know the type `Written`.
        config = OmegaConf.create(changed, flags={"allow_objects": True})
        return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise InputError(f"config.{getattr(error, 'full_key', None)}: {first_line(error)}") from None


def _set(node: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by a key such as `phases[0].lrs.head`; missing mappings are created."""
    parts: list[Any] = re.findall(r"[^.\[\]]+", key)
    if re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[[^.\[\]]+\])*", key) is None:
        raise ValueError(f"{key!r} is not a key such as data.batch_size or phases[0].epochs")
    at: Any = node
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if isinstance(at, list):
            if re.fullmatch("-?[0-9]+", part) is None:
                raise ValueError(f"Index {part!r} (str) is not an int")
            part = int(part)
        elif not isinstance(at, dict):
            raise ValueError(f"{values(at)!r} holds no {part!r}")
        if following is None:
            if isinstance(at, list):
                at[part]  # raises IndexError if the position does not exist
            at[part] = value
            return
        below = at.setdefault(part, {}) if isinstance(at, dict) else at[part]
        if isinstance(below, Written):
            below = value_of(below)
        if below is None:
            below = {}
        at[part] = at = below
