"""Load configs: yaml files with `extends`, overrides, and the check against a schema."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from interp_models.config.yaml_files import chain, overridden
from interp_models.core.files import write_whole
from interp_models.core.schema import parse
from interp_models.core.written import values


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a yaml file, merged into the file that it extends.

    `extends: FILE` is relative to the yaml file. The extended file can extend another one.

    Raises:
        InputError: if a file is missing or malformed, or extends itself.
    """
    return typing.cast(dict[str, Any], values(chain(path)))


def override(node: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply overrides `key=value` in their order.

    Items of lists are written as `phases[0].epochs=1`. Values are yaml. A value replaces the old one completely, even a
    list or a mapping: `phases[0].lrs={head: 0.1}` freezes all other groups.

    Raises:
        InputError: for a malformed override, a list position that does not exist, or an interpolation that cannot be
            resolved.
    """
    return typing.cast(dict[str, Any], values(overridden(node, assignments)))


def configured(schema: type, source: Path | Mapping[str, Any], assignments: Sequence[str] = ()) -> Any:
    """Load a config from a yaml file (or a mapping) with overrides, as an instance of its schema.

    Unlike `override(load_yaml(...))`, it knows the schema and keeps text as text: `experiment=007` is not 7. Options of
    data set, model and explainers are checked later, by the schemas of their classes (`runs.building.resolve`).

    Args:
        schema: the dataclass of the config.
        source: a yaml file, or a mapping.
        assignments: overrides `key=value`.

    Raises:
        InputError: as `load_yaml`, `override` and `check`.
    """
    return check(schema, overridden(chain(source) if isinstance(source, Path) else source, assignments))


def check(schema: type, node: Mapping[str, Any]) -> Any:
    """Make an instance of a schema from a mapping; unknown keys and wrong types raise `InputError`."""
    return schema(**parse(schema, node, "config"))


def as_dict(config: Any) -> dict[str, Any]:
    """Convert a config to dicts and lists, for yaml files and checkpoints."""
    return typing.cast(dict[str, Any], values(dataclasses.asdict(config)))


def save_yaml(path: Path, config: Mapping[str, Any]) -> None:
    """Write a config to a file from which `load_yaml` reads the same config."""
    # OmegaConf reads 1e-3 as a number, yaml as text: only OmegaConf's own dumper quotes the text "1e-3".
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(dict(config))))
