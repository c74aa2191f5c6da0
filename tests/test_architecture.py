"""Who may import whom; checked on the source, imports inside functions included."""

import ast
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "interp_models"
SCRIPTS = [ROOT / "train.py", ROOT / "evaluate.py"]

ROOMS = {
    "core": "",
    "config": "core",
    "data": "core",
    "nn": "core",
    "explainers": "core nn",
    "metrics": "core",
    "prototypes": "core data",
    "report": "core data metrics nn prototypes",
    "training": "core data nn prototypes report",
    "models": "core data nn prototypes training",
    "evaluation": "core data explainers metrics nn prototypes report training",
    "userstudy": "core data evaluation explainers report",
    "runs": "config core data evaluation explainers metrics models nn prototypes report training userstudy",
    "commands": "config core data evaluation explainers metrics models nn prototypes report runs training userstudy",
}
"""Every room, and the rooms that it may import from."""

FREE_STANDING = {"explainers", "metrics", "core", "nn"}
"""They work on any module that returns logits, and know no Lightning."""
LIBRARIES = {"torch", "torchvision", "torchmetrics", "numpy"} | set(sys.stdlib_module_names)
"""What explainers and metrics may import beside what they wrap."""

MOST_LINES = 300


def sources() -> list[Path]:
    return [*sorted(PACKAGE.rglob("*.py")), *SCRIPTS]


def name_of(path: Path) -> str:
    """Dotted name of a module's file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(tree: ast.AST, module: str, package: bool) -> Iterator[tuple[str, str | None]]:
    """Every imported module, and the name that `import` binds it to (None for `from ... import`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: None if package and node.level == 1 else -node.level + package]
                base = ".".join([*parts, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if exists(inner) else base), None


def room_of(module: str) -> str:
    """The room of a module of ours; "" of the package itself, of `__main__` and of the scripts."""
    parts = module.split(".")
    return parts[1] if parts[0] == "interp_models" and len(parts) > 1 and parts[1] != "__main__" else ""


def violations(source: str, module: str, *, package: bool = False) -> list[str]:
    """What a module's imports break."""
    found = []
    room = room_of(module)
    for name, alias in imports(ast.parse(source), module, package):
        top, other = name.split(".")[0], room_of(name)
        if top == "lightning":
            found.append(f"{module} imports {name}: the package is called pytorch_lightning here")
        if name == "pytorch_lightning" and alias not in ("pl", None):
            found.append(f"{module} imports pytorch_lightning under another name than pl")
        if room == "models" == other and name != module and module != "interp_models.models":
            found.append(f"{module} imports {name}: a model knows no other model")
        if room and top == "interp_models" and other != room and other not in ROOMS[room].split():
            found.append(f"{module} imports {name}: {room} may import {ROOMS[room] or 'nothing of ours'}")
        if room in FREE_STANDING and top == "pytorch_lightning":
            found.append(f"{module} imports {name}: {room} knows no Lightning")
        if room in ("explainers", "metrics") and top != "interp_models" and top not in LIBRARIES:
            found.append(f"{module} imports {name}: explainers and metrics stand on torch and NumPy")
    return found


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports(path: Path) -> None:
    assert violations(path.read_text(), name_of(path), package=path.name == "__init__.py") == []


def test_the_rooms_are_those_of_the_package() -> None:
    """A rule about a room that was renamed would check nothing."""
    assert set(ROOMS) == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    for rooms in ROOMS.values():
        assert set(rooms.split()) <= set(ROOMS)
    assert len(sources()) > 40


def test_no_rooms_import_each_other() -> None:
    order: list[str] = []
    while left := [room for room in ROOMS if room not in order]:
        free = [room for room in left if set(ROOMS[room].split()) <= set(order)]
        assert free, f"a circle among {left}"
        order += free


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("interp_models.models.new", "from interp_models.models.cnn import CNN", "a model knows no other model"),
        ("interp_models.models.new", "from interp_models.models import bcnn", "a model knows no other model"),
        ("interp_models.models.new", "from .bcnn import BCNN", "a model knows no other model"),
        ("interp_models.models.new", "from . import bcnn", "a model knows no other model"),
        ("interp_models.models.new", "from ..metrics import base", "models may import"),
        ("interp_models.models.new", "def f():\n    import interp_models.explainers.cam", "models may import"),
        ("interp_models.models.new", "from interp_models.evaluation import callback", "models may import"),
        ("interp_models.explainers.new", "import pytorch_lightning as pl", "explainers knows no Lightning"),
        ("interp_models.explainers.new", "from interp_models.models.cnn import CNN", "explainers may import core nn"),
        ("interp_models.explainers.new", "from interp_models.training.module import MODELS", "may import core nn"),
        ("interp_models.explainers.new", "from interp_models import MODELS", "explainers may import core nn"),
        ("interp_models.explainers.new", "from ..metrics.base import METRICS", "explainers may import core nn"),
        ("interp_models.explainers.new", "import timm", "stand on torch and NumPy"),
        ("interp_models.metrics.new", "from interp_models.data.base import Sample", "metrics may import core"),
        ("interp_models.metrics.new", "import interp_models.explainers", "metrics may import core"),
        ("interp_models.metrics.new", "if True:\n    import pandas", "stand on torch and NumPy"),
        ("interp_models.core.scoring", "from interp_models.data import DATASETS", "core may import nothing of ours"),
        ("interp_models.nn.new", "import pytorch_lightning as pl", "nn knows no Lightning"),
        ("interp_models.training.new", "from interp_models.explainers import EXPLAINERS", "training may import"),
        ("interp_models.data.base", "def f():\n    from ..metrics import METRICS", "data may import core"),
        ("interp_models.report.new", "from interp_models.runs.loading import load", "report may import"),
        ("train", "import lightning.pytorch as pl", "is called pytorch_lightning here"),
        ("interp_models.commands.new", "from lightning import Trainer", "is called pytorch_lightning here"),
        ("interp_models.runs.new", "import pytorch_lightning", "under another name than pl"),
        ("interp_models.runs.new", "import pytorch_lightning as lightning", "under another name than pl"),
    ],
)
def test_planted_violations_are_found(tmp_path: Path, module: str, source: str, rule: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(f'"""A module."""\n\nimport torch\n{source}\n')
    found = violations(path.read_text(), module)
    assert any(module in line and rule in line for line in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("interp_models.models.new", "from interp_models.training.module import MODELS\nimport timm"),
        ("interp_models.models.new", "from interp_models.core.outputs import InterpOutput"),
        ("interp_models.explainers.new", "from .base import Explainer\nimport math, torch.nn\nimport numpy as np"),
        ("interp_models.metrics.new", "from interp_models.metrics import perturbation\nimport torchmetrics"),
        ("interp_models.runs.new", "import interp_models.models, interp_models.metrics, interp_models.explainers"),
        ("interp_models.runs.new", "import pytorch_lightning as pl\nfrom pytorch_lightning.callbacks import Callback"),
        ("interp_models.core.scoring", "from interp_models.core.inputs import check_images"),
    ],
)
def test_what_is_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_files_are_short() -> None:
    """A long file is looked at again: a warning, as cutting one at a number of lines makes it no easier to read."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(files) > 40
    if over := {name: lines for name, lines in long.items() if lines > MOST_LINES}:
        warnings.warn(f"files of more than {MOST_LINES} lines: {over}", stacklevel=1)
