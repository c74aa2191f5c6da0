"""What many tests need: tiny models, a tiny data set, and tiny runs, made once."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import nn

from interp_models import DATASETS, MODELS
from tests.data.make_cub import Bird, make_cub

CUB = Path(__file__).parents[2] / "shared" / "data" / "cub"
"""Real images, for developers who have them beside the repository."""
TINY = "test_efficientnet"  # timm's own tiny network for tests, 3 stages too small to mean anything
TINY_VIT = "test_vit"


def tiny_options(model: str) -> dict[str, Any]:
    """Options that make a model small, as its class says."""
    return dict(MODELS.get(model).small)


@pytest.fixture(autouse=True)
def _threads_and_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_pets() -> Path:
    """Three breeds of Oxford-IIIT Pet in the official layout."""
    pets = CUB.parent / "pets"
    if not pets.exists():
        pytest.skip("no copy of Oxford-IIIT Pet beside the repository, in shared/data/pets")
    return pets


@pytest.fixture(scope="session")
def shared_cub() -> Path:
    """The folder of real CUB images."""
    if not CUB.is_dir():
        pytest.skip("the real CUB images are not beside the repository")
    return CUB


class PoolLinear(nn.Module):
    """Features → mean over cells → linear: the network for which class activation maps have closed forms."""

    def __init__(self, channels: int = 5, classes: int = 4, negative: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.Tanh() if negative else nn.ReLU()
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))


@pytest.fixture
def pool_linear() -> PoolLinear:
    return PoolLinear().double().eval()


def tiny_config(root: Path | str, **changes: Any) -> dict[str, Any]:
    """A config that trains in a second on fake CUB images."""
    config: dict[str, Any] = {
        "experiment": "tiny",
        "seed": 0,
        "data": {
            "dataset": {"name": "cub", "root": str(root)},
            "image_size": 64,
            "batch_size": 4,
            "num_workers": 0,
            "val_fraction": 0.25,
        },
        "model": {"name": "bcnn", "backbone": TINY, "weights": None, "output_stride": 16},
        "phases": [{"name": "train", "epochs": 2, "lrs": {"backbone": 1e-3, "attention": 1e-2, "head": 1e-2}}],
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "logger": {"wandb": "disabled"},
        "attention": {"every_n_epochs": 0},
    }
    return config | changes


class Cub(NamedTuple):
    """A fake CUB tree and what was written there."""

    root: Path
    birds: list[Bird]


@pytest.fixture(scope="session")
def tiny_cub(tmp_path_factory: pytest.TempPathFactory) -> Cub:
    """3 classes of 4 training and 4 test images; not to be changed."""
    root = tmp_path_factory.mktemp("tiny_cub")
    return Cub(root, make_cub(root, per_class=8))


def fit(config: dict[str, Any], resume: Path | None = None) -> Path:
    """Train in this process, as train.py does with a config; returns the run folder."""
    from interp_models.config.loading import check
    from interp_models.runs.building import resolve
    from interp_models.runs.config import TrainConfig
    from interp_models.runs.train import train

    return train(resolve(check(TrainConfig, config)), resume)


TINY_CNN = {"name": "cnn", "backbone": TINY, "weights": None, "output_stride": 16}
CNN_LRS = {"backbone": 1e-2, "head": 1e-2}
BCNN_LRS = {"backbone": 3e-3, "attention": 3e-3, "head": 3e-3}


@pytest.fixture(scope="session")
def bcnn_run(tiny_cub: Cub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A B-CNN that learned something in four epochs; not to be changed, see `copy_run`."""
    out = str(tmp_path_factory.mktemp("runs") / "tiny" / "bcnn")
    return fit(tiny_config(tiny_cub.root, out=out, phases=[{"epochs": 4, "lrs": BCNN_LRS}]))


@pytest.fixture(scope="session")
def cnn_run(tiny_cub: Cub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain CNN that learned something in four epochs; not to be changed, see `copy_run`."""
    out = str(tmp_path_factory.mktemp("runs") / "tiny" / "cnn")
    return fit(tiny_config(tiny_cub.root, out=out, model=TINY_CNN, phases=[{"epochs": 4, "lrs": CNN_LRS}]))


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds callbacks to the trainings of a test, in place of the attention logger."""
    from interp_models.training.attention_logger import AttentionLogger

    def add(*callbacks: Any) -> None:
        monkeypatch.setattr(AttentionLogger, "of", lambda config, run: list(callbacks))

    return add


def copy_run(run: Path, to: Path) -> Path:
    """A copy that a test may change; without an evaluation."""
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns("evaluation")))


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """A config as a yaml file."""
    path.write_text(yaml.safe_dump(config))
    return path


class Outcome(NamedTuple):
    """What a script left: exit code and outputs."""

    code: int
    out: str
    err: str


Script = Callable[..., Outcome]


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs `train.py` or `evaluate.py` in this process: script("train", "config.yaml", "seed=1")."""
    from interp_models.commands import evaluate, train

    def run(name: str, *arguments: str | Path) -> Outcome:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        code = {"train": train, "evaluate": evaluate}[name].script()
        return Outcome(code, *capsys.readouterr())

    return run


QUICK_EVALUATION = ("explainers=[intrinsic, random]", "max_steps=3", "report_images=1", "logger.wandb=disabled")
"""Overrides with which evaluate.py takes a fraction of a second on `tiny_cub`."""


collect_ignore = ["several_labels.py"]
"""A module that is imported as a plugin must not be imported under another name, too."""
SQUARES = Path(__file__).parent / "several_labels.py"
"""A plugin with the data set `squares`, whose images have several labels."""


@pytest.fixture
def squares() -> Iterator[dict[str, Any]]:
    """The data set `squares`, registered for one test."""
    from interp_models.core import plugins

    known, path = dict(DATASETS._classes()), list(sys.path)
    plugins.import_plugins([str(SQUARES)])
    yield {"name": "squares"}
    DATASETS._known.clear()
    DATASETS._known.update(known)
    sys.modules.pop("several_labels", None)
    sys.path[:] = path
    plugins._files.pop("several_labels", None)


def squares_config(out: Path, **changes: Any) -> dict[str, Any]:
    """A config that trains a small CNN on `squares` for two epochs."""
    config = tiny_config("", out=str(out), model=TINY_CNN, phases=[{"epochs": 2, "lrs": CNN_LRS}])
    config["data"]["dataset"] = {"name": "squares"}
    return config | {"plugins": [str(SQUARES)]} | changes
