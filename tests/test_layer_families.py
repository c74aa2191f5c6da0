"""What docs/layers.md says of the networks of timm, torchvision and transformers is so."""

import importlib.util

import pytest
import torch
from torch import nn

from interp_models.explainers.layers import Form, Layer
from tests.layer_families import SOURCES, check, listed, named, verdict

TABLE = listed()


class Moved(nn.Module):
    """Cells in another order: turned, mirrored or moved on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The features in this order."""
        if self.how == "turned":
            return features.transpose(2, 3)
        if self.how == "mirrored":
            return features.flip(2)
        return features if self.how == "in place" else features.roll(features.shape[3] // 2, dims=3)


@pytest.mark.parametrize("how", ["in place", "turned", "mirrored", "moved on"])
def test_the_check_refuses_cells_in_another_order(how: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 8, stride=8), nn.ReLU(), Moved(how)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    layer, images = Layer(model[4], "4", Form("nchw")), torch.rand(2, 3, 64, 64)
    if how == "in place":
        check(model, layer, images)
        return
    with pytest.raises(AssertionError, match="centres of the gradients"):
        check(model, layer, images)


def test_nothing_in_the_table_is_silently_wrong() -> None:
    assert TABLE, "docs/layers.md has no table: python -m tests.layer_families"
    assert not [row for row, said in TABLE.items() if "WRONG" in said]
    assert {source for source, _ in TABLE} == set(SOURCES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("source", "name"), sorted(TABLE))
def test_every_network_is_read_or_refused_as_the_table_says(source: str, name: str) -> None:
    if importlib.util.find_spec(source) is None:
        pytest.skip(f"{source} is not installed")
    made = named(source)
    if name not in made:
        pytest.skip(f"this version of {source} has no {name}")
    assert verdict(made[name]) == TABLE[source, name]
