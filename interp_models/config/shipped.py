"""Shipped configs: the yaml files of the package, found by name from any folder."""

import itertools
import re
from pathlib import Path

from interp_models.core.errors import InputError, unknown
from interp_models.core.written import expanded

_PACKAGE = Path(__file__).parents[1]
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""Folder of the shipped configs: inside an installed package, or at the top of a clone."""


def config_path(name: str) -> Path:
    """Find the file of a config: first in the working folder, then among the shipped configs.

    Args:
        name: a path, or the name of a shipped config. The ending `.yaml` and a leading `configs/` can be omitted, as in
            `cub/bcnn_lite0`.

    Raises:
        InputError: if it does not exist, with the nearest name.
    """
    path = Path(expanded(name))
    if (found := _found(path) or shipped(path)) is not None:
        return found
    if path.is_absolute() or (path.suffix == ".yaml" and any(path.parent.glob("*.yaml"))):
        return path  # the error on reading lists the files beside it
    hint = str(unknown("config", name, shipped_names())).partition("; ")[2]
    hint = hint if hint.startswith("did you mean") else "--list shows them"
    raise InputError(f"config {name} does not exist, neither in this folder nor among the shipped configs; {hint}")


def shipped(path: Path) -> Path | None:
    """The shipped file of a name such as `cub/bcnn_lite0` or `configs/cub/bcnn_lite0.yaml`; None if there is none."""
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    return None if path.is_absolute() or ".." in parts else _found(CONFIGS.joinpath(*parts))


def shipped_names() -> dict[str, str]:
    """The first comment of every shipped config, by its name without the ending.

    Files whose names begin with `_` are left out: other files extend them.
    """
    paths = sorted(CONFIGS.rglob("*.yaml"), key=lambda path: (len(path.relative_to(CONFIGS).parts), path))
    return {
        path.relative_to(CONFIGS).with_suffix("").as_posix(): first_comment(path)
        for path in paths
        if not path.name.startswith("_")
    }


def first_comment(path: Path) -> str:
    """The first sentence of the comment at the top of a yaml file, as one line without commands."""
    head = itertools.takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line[2:].strip() for line in head if not line.startswith("#   "))
    return re.split(r"(?<=[.])(?<!al[.])\s", text, maxsplit=1)[0]


def _found(path: Path) -> Path | None:
    return next((one for one in (path, path.with_name(f"{path.name}.yaml")) if path.name and one.is_file()), None)
