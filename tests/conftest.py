"""What many tests need: tiny models, a tiny data set, and tiny runs, made once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

TINY = "test_efficientnet"  # timm's own tiny network for tests, 3 stages too small to mean anything


@pytest.fixture(autouse=True)
def _threads_and_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_cub() -> Path:
    """Real CUB images, for developers who have them beside the repository."""
    path = Path(__file__).parents[2] / "shared" / "data" / "cub"
    if not path.is_dir():
        pytest.skip("the real CUB images are not beside the repository")
    return path


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
