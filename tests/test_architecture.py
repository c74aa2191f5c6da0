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

LEAVES = {f"interp_models.{name}" for name in ("errors", "discovery", "outputs", "rng", "files", "registry", "scoring")}
LEAVES |= {f"interp_models.{name}" for name in ("visual", "inputs", "written")}
"""What others are built on; of ours they know the error and the checks of inputs alone, and the registry how values are
written."""
LEAF_IMPORTS = {
    "interp_models.errors": LEAVES,
    "interp_models.inputs": LEAVES,
    "interp_models.written": {"interp_models.registry"},
}

FREE_STANDING = ("interp_models.explainers", "interp_models.metrics")
"""They work on any module that returns logits, and could be lifted out of the package."""
THEIR_LIBRARIES = {"torch", "torchvision", "torchmetrics", "numpy"} | set(sys.stdlib_module_names)
THEIR_MODULES = {"attention", "discovery", "errors", "inputs", "maps", "prepared", "registry", "rng", "scoring"}
THEIR_MODULES = {f"interp_models.{name}" for name in THEIR_MODULES}

KINDS = ("interp_models.models", "interp_models.explainers", "interp_models.metrics")
MEETING_PLACES = (
    "interp_models",
    "interp_models.callbacks",
    "interp_models.report.comparison",
    "interp_models.cli",
    "interp_models.runs",
    "train",
    "evaluate",
)
"""Where models, explainers and metrics meet."""

NO_MODEL_IMPORTS = ("interp_models.explainers", "interp_models.metrics", "interp_models.callbacks")

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


def violations(source: str, module: str, *, package: bool = False) -> list[str]:
    """What a module's imports break."""
    found = []
    kinds = set()
    for name, alias in imports(ast.parse(source), module, package):
        top = name.split(".")[0]
        ours = top == "interp_models"
        kinds |= {kind for kind in KINDS if within(name, kind)}
        if top == "lightning":
            found.append(f"{module} imports {name}: the package is called pytorch_lightning here")
        if name == "pytorch_lightning" and alias not in ("pl", None):
            found.append(f"{module} imports pytorch_lightning under another name than pl")
        if within(module, "interp_models.models") and module != "interp_models.models":
            other_model = within(name, "interp_models.models") and name != module
            if other_model or any(within(name, forbidden) for forbidden in NO_MODEL_IMPORTS):
                found.append(f"{module} imports {name}: a model knows no other model, explainer, metric or callback")
        for own in FREE_STANDING:
            if within(module, own):
                allowed = name in THEIR_MODULES or within(name, own) if ours else top in THEIR_LIBRARIES
                if not allowed:
                    found.append(f"{module} imports {name}: explainers and metrics stand on their own")
        if module in LEAVES and ours and module not in LEAF_IMPORTS.get(name, ()):
            found.append(f"{module} imports {name}: a leaf knows nothing of ours but the error and checks of inputs")
    if len(kinds) > 1 and not any(within(module, place) for place in MEETING_PLACES[1:]) and module != "interp_models":
        found.append(f"{module} imports {' and '.join(sorted(kinds))}, which meet elsewhere")
    return found


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports(path: Path) -> None:
    assert violations(path.read_text(), name_of(path), package=path.name == "__init__.py") == []


def test_every_named_module_exists() -> None:
    """A rule about a module that was renamed would check nothing."""
    for module in {*LEAVES, *FREE_STANDING, *THEIR_MODULES, *KINDS, *MEETING_PLACES, *NO_MODEL_IMPORTS}:
        assert exists(module), module
    names = {name_of(path) for path in sources()}
    assert names >= LEAVES
    assert len(names) > 40


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("interp_models.models.new", "from interp_models.models.cnn import CNN", "a model knows no other model"),
        ("interp_models.models.new", "from interp_models.models import bcnn", "a model knows no other model"),
        ("interp_models.models.new", "from .bcnn import BCNN", "a model knows no other model"),
        ("interp_models.models.new", "from . import bcnn", "a model knows no other model"),
        ("interp_models.models.new", "from ..metrics import base", "a model knows no other model"),
        (
            "interp_models.models.new",
            "def f():\n    import interp_models.explainers.cam",
            "a model knows no other model",
        ),
        ("interp_models.models.new", "from interp_models.callbacks import attention_logger", "a model knows no other"),
        ("interp_models.explainers.new", "import pytorch_lightning as pl", "stand on their own"),
        ("interp_models.explainers.new", "from interp_models.models.cnn import CNN", "stand on their own"),
        ("interp_models.explainers.new", "from interp_models.training.module import MODELS", "stand on their own"),
        ("interp_models.explainers.new", "from interp_models import MODELS", "stand on their own"),
        ("interp_models.explainers.new", "from ..metrics.base import METRICS", "stand on their own"),
        ("interp_models.explainers.new", "import timm", "stand on their own"),
        ("interp_models.metrics.new", "from interp_models.data.base import Sample", "stand on their own"),
        ("interp_models.metrics.new", "import interp_models.explainers", "stand on their own"),
        ("interp_models.metrics.new", "if True:\n    import pandas", "stand on their own"),
        ("interp_models.scoring", "from interp_models.rng import uniform", "a leaf knows nothing of ours"),
        ("interp_models.errors", "from interp_models import registry", "a leaf knows nothing of ours"),
        ("interp_models.inputs", "from interp_models.scoring import Target", "a leaf knows nothing of ours"),
        (
            "interp_models.training.module",
            "from interp_models.explainers import EXPLAINERS\nfrom interp_models.metrics.base import METRICS",
            "which meet elsewhere",
        ),
        (
            "interp_models.data.base",
            "import interp_models.models\ndef f():\n    from ..metrics import METRICS",
            "which meet elsewhere",
        ),
        ("train", "import lightning.pytorch as pl", "is called pytorch_lightning here"),
        ("interp_models.cli", "from lightning import Trainer", "is called pytorch_lightning here"),
        ("interp_models.cli", "import pytorch_lightning", "under another name than pl"),
        ("interp_models.cli", "import pytorch_lightning as lightning", "under another name than pl"),
    ],
)
def test_planted_violations_are_found(tmp_path: Path, module: str, source: str, rule: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(f'"""A module."""\n\nimport torch\n{source}\n')
    (found,) = violations(path.read_text(), module)
    assert module in found
    assert rule in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("interp_models.models.new", "from interp_models.training.module import MODELS\nimport timm"),
        ("interp_models.models.new", "from interp_models.outputs import InterpOutput"),
        ("interp_models.explainers.new", "from .base import Explainer\nimport math, torch.nn\nimport numpy as np"),
        ("interp_models.metrics.new", "from interp_models.metrics import perturbation\nimport torchmetrics"),
        ("interp_models.callbacks.new", "import interp_models.models, interp_models.metrics, interp_models.explainers"),
        ("interp_models.cli", "import pytorch_lightning as pl\nfrom pytorch_lightning.callbacks import Callback"),
        ("interp_models.scoring", "from interp_models.errors import InputError"),
        ("interp_models.scoring", "from interp_models.inputs import check_images"),
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
