"""What is known of a model is forgotten when the model changes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from interp_models import EXPLAINERS
from interp_models.core.known import known_of


class Holds(nn.Module):
    """A network with an attribute that is no module."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.config = nn.Conv2d(3, 5, 4, 4), nn.Linear(5, 3), held

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.conv(x).relu().mean(dim=(2, 3)))
        on = self.config[0] if isinstance(self.config, np.ndarray) else self.config.on
        return y.flip(1) if on else y


def nested(on: bool) -> SimpleNamespace:
    config = SimpleNamespace(on=on, text=SimpleNamespace(sizes=[1, 2]), layer=nn.Linear(2, 2))
    config.itself = config
    return config


@pytest.mark.parametrize("kind", ["namespace", "array"])
def test_a_changed_config_is_seen(kind: str) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = Holds(nested(False) if kind == "namespace" else np.zeros(2)).eval()
    method = EXPLAINERS.build("rise", {"masks": 20}, model=model)
    method.attribute(images, 0)
    if kind == "namespace":
        model.config.on = True
    else:
        model.config[0] = 1
    fresh = Holds(nested(True) if kind == "namespace" else np.ones(2)).eval()
    expected = EXPLAINERS.build("rise", {"masks": 20}, model=fresh).attribute(images, 0)
    torch.testing.assert_close(method.attribute(images, 0), expected)


def test_what_lies_deeper_is_seen_and_what_stays_is_kept() -> None:
    model = Holds(nested(False))
    known_of(model)["a"] = 1
    assert known_of(model) == {"a": 1}
    model.config.text.sizes[1] = 3
    assert known_of(model) == {}
    known_of(model)["a"] = 1
    with torch.no_grad():
        model.config.layer.weight.zero_()
    assert known_of(model) == {}
