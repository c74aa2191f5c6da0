"""What an import loads, and under which names classes are exported. Of modules, never of time."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import interp_models
from interp_models import DATASETS, EXPLAINERS, METRICS, MODELS, PROTOTYPE_METRICS
from interp_models.core.discovery import registered
from interp_models.core.errors import InputError
from interp_models.core.registry import Registry

ROOT = Path(__file__).parents[1]
SLOW = ("pytorch_lightning", "wandb", "timm", "matplotlib", "pandas", "torchvision", "torchmetrics", "omegaconf")
"""Libraries that explaining a model does not need."""
PACKAGES = {
    "data": (DATASETS,),
    "explainers": (EXPLAINERS,),
    "metrics": (METRICS, PROTOTYPE_METRICS),
    "models": (MODELS,),
}


def loaded(code: str, *arguments: str | Path, watched: tuple[str, ...] = SLOW) -> list[str]:
    """Which of the watched modules, or of those below them, a fresh process has loaded after some code."""
    end = f"import sys; print([m for m in {watched!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{end}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return list(re.findall(r"'([\w.]+)'", done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", SLOW)
def test_a_module_that_is_loaded_is_seen(module: str) -> None:
    """The tests below can fail; a module of this name in place of the library is enough."""
    code = f"import sys, types; sys.modules[{module!r}] = types.ModuleType({module!r})\nimport interp_models"
    assert loaded(code) == [module]


def test_a_library_that_is_imported_is_seen() -> None:
    assert "torchvision" in loaded("from interp_models.data import PartBirds")
    assert loaded("import torch", watched=("torch", "numpy")) == ["torch", "numpy"]


def test_the_package_alone_loads_nothing() -> None:
    assert loaded("import interp_models; interp_models.__version__", watched=(*SLOW, "torch", "numpy", "yaml")) == []


@pytest.mark.parametrize(
    "code",
    [
        "from interp_models.explainers import GradCAM",
        "from interp_models import EXPLAINERS, InputError, InterpOutput, NotApplicable, probabilities",
        "from interp_models.explainers import *",
        "import interp_models; interp_models.EXPLAINERS.get('rise')",
    ],
)
def test_explainers_load_no_slow_library(code: str) -> None:
    assert loaded(code) == []


def test_every_explainer_works_on_a_model_without_them() -> None:
    code = """
import torch
from interp_models.explainers import GradCAM, RISE
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                            torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
for explainer in (GradCAM(model), RISE(model, masks=4)):
    assert explainer.attribute(torch.rand(1, 3, 16, 16)).isfinite().all()
"""
    assert loaded(code) == []


@pytest.mark.slow
def test_a_class_is_imported_with_its_own_file_alone() -> None:
    others = ("interp_models.explainers.rise", "interp_models.explainers.surrogates", "interp_models.models.bcnn")
    assert loaded("from interp_models.explainers import GradCAM", watched=others) == []
    assert loaded("from interp_models import MODELS; MODELS.get('cnn')", watched=others) == []
    assert loaded("from interp_models import EXPLAINERS; EXPLAINERS.names()", watched=others) == list(others[:2])


# Commands


def answer(command: str, *arguments: str | Path, code: int) -> str:
    """A command in a fresh process, run to its end with this exit code."""
    call = f"import sys; from interp_models.commands.{command} import script; code = script(sys.argv[1:])"
    return f"{call}; assert code == {code}, code"


@pytest.mark.parametrize(
    ("command", "arguments", "code"),
    [
        ("train", ["--help"], 0),
        ("evaluate", ["--help"], 0),
        ("train", ["--help", "phases", "cub/bcnn_lite0"], 0),
        ("train", ["--list"], 0),
        ("evaluate", ["--list"], 0),
        ("train", ["--seed"], 2),
        ("train", ["cub/bcn_lite0"], 2),
        ("train", ["quickstart", "sed=1"], 2),
        ("train", ["quickstart", "phases[0].epoch=1"], 2),
        ("train", ["--help", "gradcm"], 2),
        ("evaluate", ["RUN", "config=eval/post"], 2),
        ("evaluate", ["RUN", "metric=[dauc]"], 2),
        ("evaluate", [], 2),
    ],
)
def test_answers_load_no_slow_library(command: str, arguments: list[str], code: int) -> None:
    config_reader = {"omegaconf"}
    slow = tuple(module for module in (*SLOW, "torch", "numpy") if module not in config_reader)
    assert loaded(answer(command, code=code), *arguments, watched=slow) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "spoken_of", "others"),
    [
        (["--help", "gradcam"], 0, ["explainers.cam"], ["explainers.rise", "models.cnn", "metrics", "data"]),
        (["--help", "bcnn"], 0, ["models.bcnn"], ["models.cnn", "explainers", "metrics"]),
        (["--help", "explainers"], 0, ["explainers.cam", "explainers.rise"], ["models", "metrics", "data"]),
        (["--help", "data"], 0, ["data.cub", "data.module"], ["models", "explainers", "metrics"]),
        (["quickstart", "model.n_map=1"], 2, ["models.bcnn"], ["explainers", "metrics", "report"]),
        (
            ["quickstart", "data.dataset.sed=1"],
            2,
            ["data.part_birds"],
            ["models.cnn", "explainers", "metrics", "report"],
        ),
    ],
)
def test_answers_load_the_classes_they_speak_of(
    arguments: list[str], code: int, spoken_of: list[str], others: list[str]
) -> None:
    watched = tuple(f"interp_models.{name}" for name in (*spoken_of, *others))
    found = loaded(answer("train", code=code), *arguments, watched=watched)
    assert found == [f"interp_models.{name}" for name in spoken_of]


# Names


@pytest.mark.parametrize("name", PACKAGES)
def test_every_registered_class_is_exported_by_its_name(name: str) -> None:
    package = importlib.import_module(f"interp_models.{name}")
    everything: dict[str, Any] = {}
    exec(f"from interp_models.{name} import *", everything)
    for registry in PACKAGES[name]:
        assert len(registry) > 0
        for key in registry:
            cls = registry.get(key)
            assert getattr(package, cls.__name__) is everything[cls.__name__] is cls
            assert cls.__name__ in package.__all__
            assert cls.__name__ in dir(package)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_source_says_what_is_registered(name: str) -> None:
    """`registered` reads it there, and `Registry` imports the files: one list."""
    entries = registered(f"interp_models.{name}")
    by_registry = {
        id(getattr(importlib.import_module(f"interp_models.{name}"), e.registry)): e.registry for e in entries
    }
    for registry in PACKAGES[name]:
        own = [entry for entry in entries if entry.registry == by_registry[id(registry)]]
        classes = {key: registry.get(key) for key in registry.names()}
        assert {e.name: (e.cls, e.module) for e in own} == {
            key: (cls.__name__, cls.__module__) for key, cls in classes.items() if cls.__module__.startswith("interp_m")
        }


def test_a_new_file_is_found_without_any_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shapes_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from interp_models.core.registry import Registry\nSHAPES = Registry('shape', 'shapes_of_a_test.SHAPES')\n"
    )
    (package / "round.py").write_text(
        "from shapes_of_a_test import SHAPES\n@SHAPES.register('circle')\nclass Circle:\n    pass\n"
    )
    (package / "computed.py").write_text(
        "from shapes_of_a_test import SHAPES\nclass Square:\n    pass\nSHAPES.register('squ' + 'are')(Square)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shapes: Registry[Any] = importlib.import_module("shapes_of_a_test").SHAPES
    assert shapes.get("circle").__module__ == "shapes_of_a_test.round"
    assert "shapes_of_a_test.computed" not in sys.modules
    assert shapes.get("square").__name__ == "Square"  # its name stands in no decorator
    assert shapes.names() == ["circle", "square"]


def test_names_that_do_not_exist() -> None:
    with pytest.raises(ImportError, match="cannot import name 'GradCam'"):
        exec("from interp_models.explainers import GradCam")
    with pytest.raises(AttributeError, match="module 'interp_models' has no attribute 'EXPLAINER'"):
        interp_models.EXPLAINER  # noqa: B018
    assert not hasattr(interp_models.explainers, "_private")
    assert interp_models.explainers.cam.GradCAM is EXPLAINERS.get("gradcam")  # modules are attributes too


def test_the_public_names_of_the_package() -> None:
    for name in interp_models.__all__:
        if name != "judge" or (ROOT / "interp_models/evaluation/judge.py").is_file():
            assert getattr(interp_models, name) is not None
    assert set(interp_models.__all__) <= set(dir(interp_models))
    assert set(interp_models._HOMES) | {"__version__", "visual"} == set(interp_models.__all__)


def test_two_classes_of_one_name_are_refused() -> None:
    registry: Registry[Any] = Registry("shape")
    registry.register("circle")(type("Circle", (), {}))
    registry.register("square")(type("Square", (), {}))
    with pytest.raises(InputError, match=r"^shape 'disc': tests.test_imports also registers a class Circle; rename"):
        registry.register("disc")(type("Circle", (), {}))
    # Also where the file of the other is not imported yet
    with pytest.raises(
        InputError, match=r"^explainer 'mine': interp_models\.explainers\.surrogates also registers a class LI"
    ):
        EXPLAINERS.register("mine")(type("LIME", (), {}))
    with pytest.raises(
        InputError, match=r"^explainer 'rise' is already registered by interp_models\.explainers\.rise;"
    ):
        EXPLAINERS.register("rise")(type("Mine", (), {}))


def test_a_class_of_a_notebook_may_be_defined_again() -> None:
    registry: Registry[Any] = Registry("shape")
    first, second = (type("Circle", (), {"__module__": "__main__"}) for _ in range(2))
    registry.register("circle")(first)
    registry.register("circle")(second)
    assert registry.get("circle") is second
    with pytest.raises(InputError, match="also registers a class Circle"):
        registry.register("disc")(type("Circle", (), {"__module__": "elsewhere"}))


def test_the_version_is_that_of_the_project() -> None:
    tomllib = importlib.import_module("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "interp_models.core.version.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", interp_models.__version__)
