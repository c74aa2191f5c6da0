"""Configs: yaml files, `extends`, overrides, and the check against a schema."""

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
    """A yaml file with its base merged in: `extends: FILE` is relative to the file, and may extend another.

    Raises:
        InputError: if a file is missing or malformed, or extends itself.
    """
    return typing.cast(dict[str, Any], values(chain(path)))


def override(node: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `key=value` one by one; lists are addressed by `phases[0].epochs=1`, values are yaml.

    A value replaces what was there, also a list or a mapping: `phases[0].lrs={head: 0.1}` freezes the other groups.

    Raises:
        InputError: for a malformed assignment, a list position that does not exist, or an interpolation that leads
            nowhere.
    """
    return typing.cast(dict[str, Any], values(overridden(node, assignments)))


def configured(schema: type, source: Path | Mapping[str, Any], assignments: Sequence[str] = ()) -> Any:
    """The config of a yaml file (or of a node) with overrides, as an instance of its schema.

    Unlike `override` of `load_yaml`, it leaves text as it is written: `experiment=007` is not 7. Options of the data
    set, the model and explainers are read when their own schemas are known, those of a training by `runs.resolve`.

    Raises:
        InputError: as `load_yaml`, `override` and `check`.
    """
    return check(schema, overridden(chain(source) if isinstance(source, Path) else source, assignments))


def check(schema: type, node: Mapping[str, Any]) -> Any:
    """The config as an instance of its schema; unknown keys and wrong types raise `InputError`."""
    return schema(**parse(schema, node, "config"))


def as_dict(config: Any) -> dict[str, Any]:
    """A config as dicts and lists, for yaml files and checkpoints."""
    return typing.cast(dict[str, Any], values(dataclasses.asdict(config)))


def save_yaml(path: Path, config: Mapping[str, Any]) -> None:
    """Write a config that `load_yaml` reads back the same."""
    # OmegaConf reads 1e-3 as a number, yaml does not: only OmegaConf's own dumper quotes a string like that.
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(dict(config))))
