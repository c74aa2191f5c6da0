"""Products of float32 stay float32 wherever maps and scores are taken."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interp_models.core.modes import PRODUCTS, full_float32
from interp_models.core.scoring import probabilities
from interp_models.explainers import EXPLAINERS
from interp_models.metrics import METRICS
from interp_models.metrics.case import Case


def _state() -> list[Any]:
    """All switches, old and new; those that cannot be read as their error."""
    reads: list[Callable[[], Any]] = [
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
        *(lambda product=product: product.fp32_precision for product in PRODUCTS),
    ]
    found = []
    for read in reads:
        try:
            found.append(read())
        except RuntimeError as error:
            found.append(str(error))
    return found


def _restore() -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    for product, own in zip(PRODUCTS, ("none", "tf32", "tf32", "none", "none", "none"), strict=True):
        product.fp32_precision = own


@pytest.fixture(autouse=True)
def defaults() -> Iterator[list[Any]]:
    """Torch's defaults, before and after."""
    before = _state()
    yield before
    _restore()
    assert _state() == before


def _high() -> None:
    torch.set_float32_matmul_precision("high")


def _medium() -> None:
    torch.set_float32_matmul_precision("medium")


def _old_switch() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def _new_switch() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _of_all() -> None:
    torch.backends.fp32_precision = "tf32"


def _off() -> None:
    torch.backends.cudnn.allow_tf32 = False


SETTINGS: list[Callable[[], None]] = [lambda: None, _high, _medium, _old_switch, _new_switch, _of_all, _off]


@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_is_full_inside_and_the_setting_comes_back(setting: Callable[[], None]) -> None:
    setting()
    before = _state()
    with full_float32():
        assert [product.fp32_precision for product in PRODUCTS] == ["ieee"] * len(PRODUCTS)
        with full_float32():
            pass
        assert [product.fp32_precision for product in PRODUCTS] == ["ieee"] * len(PRODUCTS)
    assert _state() == before
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert _state() == before


@pytest.mark.parametrize("setting", [lambda: None, _high, _medium, _old_switch, _off])
def test_old_switches_can_be_read_inside(setting: Callable[[], None]) -> None:
    """torch.compile reads them, and torch fails where old and new ones differ."""
    setting()
    with full_float32():
        assert torch.backends.cudnn.allow_tf32 is False
        assert torch.backends.cuda.matmul.allow_tf32 is False
        assert torch.get_float32_matmul_precision() == "highest"


class Watching(nn.Module):
    """Notes the switches at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 4, stride=4)
        self.seen: list[list[str]] = []

    def forward(self, images: Tensor) -> Tensor:
        """(B, 2)."""
        self.seen.append([product.fp32_precision for product in PRODUCTS])
        logits: Tensor = self.layer(images).mean(dim=(2, 3))
        return logits


def test_passes_of_explainers_and_metrics_are_of_full_float32(defaults: list[Any]) -> None:
    model, images = Watching().eval(), torch.rand(2, 3, 8, 8)
    model(images)
    assert model.seen.pop() != ["ieee"] * len(PRODUCTS)
    expected = model(images).softmax(dim=1)
    model.seen.clear()
    assert torch.equal(probabilities(model)(images), expected)
    EXPLAINERS.build("gradient", {}, model=model).attribute(images, 0)

    def score(some: Tensor) -> Tensor:
        return model(some).softmax(dim=1)

    METRICS.get("masked_confidence")().score(Case(images, torch.rand(2, 2, 2), 0, score))
    assert len(model.seen) >= 4
    assert all(seen == ["ieee"] * len(PRODUCTS) for seen in model.seen)
    assert _state() == defaults
