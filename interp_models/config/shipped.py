"""The yaml files that come with the package: found by name from any folder."""

import itertools
import re
from pathlib import Path

from interp_models.core.errors import InputError, unknown
from interp_models.core.written import expanded

_PACKAGE = Path(__file__).parents[1]
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""Inside an installed package, at the top of a clone."""


def config_path(name: str) -> Path:
    """The file of a config: one in the working folder, or else one that is shipped.

    The ending `.yaml` and a leading `configs/` may be left out: `cub/bcnn_lite0`.

    Raises:
        InputError: if there is neither, with the nearest name.
    """
    path = Path(expanded(name))
    if (found := _found(path) or shipped(path)) is not None:
        return found
    if path.is_absolute() or (path.suffix == ".yaml" and any(path.parent.glob("*.yaml"))):
        return path  # the reader lists the files beside it
    hint = str(unknown("config", name, shipped_names())).partition("; ")[2]
    hint = hint if hint.startswith("did you mean") else "--list shows them"
    raise InputError(f"config {name} does not exist, neither here nor among those that are shipped; {hint}")


def shipped(path: Path) -> Path | None:
    """The shipped file of a name such as `cub/bcnn_lite0`, `cub/bcnn_lite0.yaml` or `configs/cub/bcnn_lite0.yaml`."""
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    return None if path.is_absolute() or ".." in parts else _found(CONFIGS.joinpath(*parts))


def shipped_names(folder: str = "") -> dict[str, str]:
    """The first comment of every shipped file below a folder of them, by its name without ending.

    Files whose name begins with `_` are for others to extend, and are left out.
    """
    paths = sorted((CONFIGS / folder).rglob("*.yaml"), key=lambda path: (len(path.relative_to(CONFIGS).parts), path))
    return {
        path.relative_to(CONFIGS).with_suffix("").as_posix(): first_comment(path)
        for path in paths
        if not path.name.startswith("_")
    }


def first_comment(path: Path) -> str:
    """The first sentence of the comment at the head of a yaml file, on one line; commands in it are left out."""
    head = itertools.takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line[2:].strip() for line in head if not line.startswith("#   "))
    return re.split(r"(?<=[.])(?<!al[.])\s", text, maxsplit=1)[0]


def _found(path: Path) -> Path | None:
    return next((one for one in (path, path.with_name(f"{path.name}.yaml")) if path.name and one.is_file()), None)
