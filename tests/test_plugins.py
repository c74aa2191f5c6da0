"""Code of users that registers itself: files, packages, installed packages; and what of it a run keeps."""

import json
import multiprocessing
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from interp_models import DATASETS, EXPLAINERS, METRICS, MODELS, PROTOTYPE_METRICS, load
from interp_models.config.loading import load_yaml
from interp_models.core import plugins
from interp_models.core.errors import InputError
from interp_models.core.plugins import import_plugins, located
from interp_models.training.checkpoints import read_checkpoint
from tests.conftest import CNN_LRS, QUICK_EVALUATION, TINY_CNN, Cub, Script, copy_run, tiny_config, write_config
from tests.test_cli import refused

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/plugins.md").read_text()
REGISTRIES = (DATASETS, EXPLAINERS, METRICS, MODELS, PROTOTYPE_METRICS)
MODEL = """
from interp_models.core.registry import Registry
from interp_models.models import CNN
from interp_models.training.module import MODELS

@MODELS.register("{name}")
class {cls}(CNN):
    pass
"""


@pytest.fixture(autouse=True)
def _own_plugins(tmp_path: Path) -> Iterator[None]:
    """Takes back what a test registers and imports."""
    known = [dict(registry._classes()) for registry in REGISTRIES]
    path = list(sys.path)
    yield
    for registry, classes in zip(REGISTRIES, known, strict=True):
        registry._known.clear()
        registry._known.update(classes)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{tmp_path}/"):
            del sys.modules[name]
    sys.path[:] = path
    plugins._files.clear()
    plugins.installed.cache_clear()


def shown(name: str) -> str:
    """A file as the page shows it, behind the sentence that names it."""
    match = re.search(rf"`{re.escape(name)}`[^`]*```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert match is not None
    return match[1]


def install(site: Path, name: str, version: str, points: dict[str, str]) -> None:
    """What an installer writes of a package with plugins."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[interp_models.plugins]", *lines, ""]))


def explainers_of(run: Path) -> list[str]:
    rows = json.loads((run / "evaluation/results.json").read_text())["rows"]
    return list(dict.fromkeys(row["explainer"] for row in rows))


def test_the_documented_file(script: Script, bcnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a yaml, in a folder outside of the repository."""
    assert ROOT not in tmp_path.parents
    (tmp_path / "deep").mkdir()
    for name in ("saturation.py", "mine.yaml"):
        (tmp_path / "deep" / name).write_text(shown(name))
    run = copy_run(bcnn_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    refused(script("evaluate", run, "explainers=[saturation]"), "unknown explainer 'saturation'")
    outcome = script("evaluate", "run", "config=deep/mine.yaml", *QUICK_EVALUATION[1:], "n_images=3")
    assert outcome.code == 0, outcome.err
    assert explainers_of(run) == ["intrinsic", "saturation", "random"]
    images = torch.rand(2, 3, 4, 4)
    expected = images.max(1).values - images.min(1).values
    assert torch.equal(EXPLAINERS.build("saturation", model=torch.nn.Identity()).attribute(images, 0), expected)
    assert "explainers: saturation (saturation.Saturation)" in script("evaluate", "--help", "saturation").out


def test_the_documented_package(
    script: Script, bcnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found without being named; `test_wheel` installs it by pip."""
    site, project = tmp_path / "site", tomllib.loads(shown("pyproject.toml"))["project"]
    site.mkdir()
    (site / "brightness_methods.py").write_text(shown("brightness_methods.py"))
    install(site, project["name"], project["version"], project["entry-points"]["interp_models.plugins"])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.syspath_prepend(site)
    plugins.installed.cache_clear()
    assert plugins.installed() == {"brightness_methods": "brightness-methods"}
    assert "brightness_methods" in script("train", "--help").out
    EXPLAINERS.get("gradcam")
    assert "brightness_methods" not in sys.modules  # not before it is needed
    run = copy_run(bcnn_run, tmp_path / "run")
    outcome = script("evaluate", run, "explainers=[intrinsic, brightness]", *QUICK_EVALUATION[1:], "n_images=3")
    assert outcome.code == 0, outcome.err
    assert explainers_of(run) == ["intrinsic", "brightness"]
    assert "brightness" in EXPLAINERS.names()


def test_an_installed_plugin_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_plugin.py").write_text("x = 1\ny = x + z\n")
    install(tmp_path, "broken", "1.0", {"any": "broken_plugin"})
    monkeypatch.syspath_prepend(tmp_path)
    plugins.installed.cache_clear()
    assert EXPLAINERS.get("gradcam").__name__ == "GradCAM"
    for _ in range(2):
        with pytest.raises(InputError) as error:
            EXPLAINERS.names()
        assert str(error.value) == (
            "plugin broken_plugin of the installed package broken: broken_plugin.py line 2: NameError: name 'z' is not "
            "defined"
        )


def train_with(script: Script, cub: Cub, folder: Path, *overrides: str, **changes: object) -> Path:
    """A run of a model that `my_model.py` in a folder registers; its yaml lies there too."""
    (folder / "my_model.py").write_text(MODEL.format(name="my_model", cls="MyModel"))
    node = tiny_config(cub.root, model={**TINY_CNN, "name": "my_model"}, phases=[{"epochs": 1, "lrs": CNN_LRS}])
    config = write_config(folder / "c.yaml", {**node, "plugins": ["my_model.py"], **changes})
    outcome = script("train", config, f"out={folder}/run", *overrides)
    assert outcome.code == 0, outcome.err
    return folder / "run"


def forget() -> None:
    """As in a new process."""
    MODELS._known.pop("my_model", None)
    sys.modules.pop("my_model", None)
    plugins._files.clear()


def test_a_run_keeps_its_plugins(
    script: Script, tiny_cub: Cub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_with(script, tiny_cub, tmp_path)
    assert load_yaml(run / "config.yaml")["plugins"] == [f"{tmp_path}/my_model.py"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    forget()
    assert type(load(run)[0]).__name__ == "MyModel"
    forget()
    assert script("evaluate", run, *QUICK_EVALUATION, "n_images=2").code == 0
    forget()
    assert script("train", f"resume={run}", "phases[0].epochs=2").code == 0
    # The file moves
    (tmp_path / "my_model.py").rename("my_model.py")
    forget()
    refused(
        script("evaluate", run), f"run {run}: plugin {tmp_path}/my_model.py: {tmp_path}/my_model.py does not exist; "
    )
    with pytest.raises(InputError, match=r"my_model\.py does not exist; if it has moved, .* by plugins=\[FILE\]"):
        load(run)
    assert type(load(run, plugins=["my_model.py"])[0]).__name__ == "MyModel"
    forget()
    assert script("evaluate", run, *QUICK_EVALUATION, "n_images=2", "plugins=[my_model.py]").code == 0
    forget()
    outcome = script("train", f"resume={run}", "phases[0].epochs=3", "plugins=[my_model.py]")
    assert outcome.code == 0, outcome.err
    assert load_yaml(run / "config.yaml")["plugins"] == [f"{tmp_path}/my_model.py"]  # places count for one command


def test_a_checkpoint_names_no_code(script: Script, tiny_cub: Cub, tmp_path: Path) -> None:
    run = train_with(script, tiny_cub, tmp_path)
    trap = tmp_path / "trap.py"
    trap.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'caught')!r}).write_text('')\n")
    for path in (run / "checkpoints").glob("*.ckpt"):
        checkpoint = read_checkpoint(path)
        assert checkpoint["interp_models"]["config"]["plugins"] == [f"{tmp_path}/my_model.py"]
        checkpoint["interp_models"]["config"]["plugins"] = [str(trap)]
        torch.save(checkpoint, path)
    load(run)
    assert script("train", f"resume={run}", "phases[0].epochs=2").code == 0
    assert script("evaluate", run, *QUICK_EVALUATION, "n_images=2").code == 0
    assert not (tmp_path / "caught").exists()
    import_plugins([str(trap)])
    assert (tmp_path / "caught").exists()  # it would have been


def test_where_relative_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/base.yaml").write_text("plugins: [one.py, ~/two.py, /three.py, package, folder]\n")
    (tmp_path / "a/folder").mkdir()
    (tmp_path / "a/folder/__init__.py").write_text("")
    (tmp_path / "top.yaml").write_text("extends: a/base.yaml\nseed: 1\n")
    monkeypatch.setenv("HOME", "/home/of/nobody")
    folder = tmp_path / "a"
    expected = [f"{folder}/one.py", "/home/of/nobody/two.py", "/three.py", "package", f"{folder}/folder"]
    assert load_yaml(tmp_path / "top.yaml")["plugins"] == expected
    assert located(expected, Path("/elsewhere")) == expected
    (tmp_path / "top.yaml").write_text("extends: a/base.yaml\nplugins: [four.py]\n")
    assert load_yaml(tmp_path / "top.yaml")["plugins"] == [f"{tmp_path}/four.py"]


def test_files_and_folders_are_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("helper_of_mine.py").write_text("VALUE = 3\n")
    Path("counted.py").write_text("import sys, helper_of_mine\nsys.counted = getattr(sys, 'counted', 0) + 1\n")
    Path("whole").mkdir()
    Path("whole/__init__.py").write_text("from whole import part\n")
    Path("whole/part.py").write_text("from counted import helper_of_mine\n")
    try:
        import_plugins(["counted.py", str(tmp_path / "counted.py"), "whole", "./whole", "counted.py"])
        assert sys.counted == 1  # type: ignore[attr-defined]
    finally:
        del sys.counted  # type: ignore[attr-defined]
    assert sys.modules["whole.part"].helper_of_mine.VALUE == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.py", None, "plugin gone.py: {tmp}/gone.py does not exist; if it has moved, give its new place by plug"),
        (
            "gone_package",
            None,
            "plugin gone_package: no package of this name is installed; give a file with its ending",
        ),
        ("a/b", None, "plugin a/b: {tmp}/a/b does not exist"),
        ("fails.py", "x = 1\n\n1 / 0\n", "plugin fails.py: fails.py line 3: ZeroDivisionError: division by zero"),
        (
            "needs.py",
            "import nothing_like_it\n",
            "plugin needs.py: needs.py line 1: ModuleNotFoundError: No module nam",
        ),
        ("wrong.py", "x = (\n", "plugin wrong.py: wrong.py line 1: SyntaxError: '(' was never closed"),
        ("json.py", "", "plugin json.py: another module has the name json ({json}); rename the file"),
        ("sys.py", "", "plugin sys.py: another module has the name sys (of Python); rename the file"),
        ("my-method.py", "", "plugin my-method.py: 'my-method' cannot name a Python module; use letters, digits and"),
        (
            "takes.py",
            MODEL.format(name="bcnn", cls="Mine"),
            "plugin takes.py: model 'bcnn' is already registered by interp_models.models.bcnn; choose another name",
        ),
        (
            "calls.py",
            MODEL.format(name="mine", cls="BCNN"),
            "plugin calls.py: model 'mine': interp_models.models.bcnn also registers a class BCNN; rename it, because",
        ),
    ],
)
def test_refusals(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    expected = message.format(tmp=tmp_path, json=json.__file__)
    with pytest.raises(InputError) as error:
        import_plugins([name])
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)
    written = located([name], Path())[0]  # as a config has it
    refused(script("train", "quickstart", f"plugins=[{name}]"), expected.replace(f"plugin {name}", f"plugin {written}"))


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for folder, text in (("a", "x = 1"), ("b", "x = 1"), ("c", "x = 2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(text)
    import_plugins([f"{tmp_path}/{folder}/same_name.py" for folder in "ab"])
    with pytest.raises(InputError, match=r"a/same_name\.py is in use and has the same name but other contents; rename"):
        import_plugins([f"{tmp_path}/c/same_name.py"])


def test_processes_that_load_images_find_it(tmp_path: Path) -> None:
    """Also those that are not forked, which get objects by their module's name."""
    (tmp_path / "of_a_loader.py").write_text("def double(x):\n    return 2 * x\n")
    import_plugins([f"{tmp_path}/of_a_loader.py"])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(sys.modules["of_a_loader"].double, [2]) == [4]
