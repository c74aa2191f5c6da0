"""Which maps keep the positions of the image, by small networks whose answer one constant of the search decides."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from interp_models import NotApplicable
from interp_models.explainers import bias_places, fullgrad
from interp_models.explainers.fullgrad import FullGrad, SmoothFullGrad, _maps
from interp_models.explainers.places import order
from tests.mutation import mutated

Change = Callable[[Tensor], Tensor]
MODULE = "interp_models.explainers.bias_places"


def pixels(side: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def wide(kernels: tuple[int, ...], seed: int, before: nn.Module | None = None) -> nn.Sequential:
    """Cells of 4 pixels, and convolutions that see their neighbours; `before` changes the image."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 4, stride=4)]
    for kernel in kernels:
        layers += [nn.ReLU(), nn.Conv2d(8, 8, kernel, padding=kernel // 2)]
    layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*([] if before is None else [before]), *layers).eval()


class Changed(nn.Module):
    """Cells as they are, and then in another order."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change, self.first, self.second = change, nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.change(self.first(x).relu())).relu()
        y: Tensor = self.head(x.mean(dim=(2, 3)))
        return y


def shuffled(x: Tensor) -> Tensor:
    cells = torch.randperm(x.shape[2] * x.shape[3], generator=torch.Generator().manual_seed(0))
    return x.flatten(2)[..., cells].view_as(x)


class Thin(nn.Module):
    """Features of all pixels but the outermost rows and columns, less than a quarter of a cell of `COARSE`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x[:, :, 1:-1, 1:-1]).relu().mean(dim=(2, 3)))
        return y


CASES: dict[str, tuple[nn.Module, Tensor, bool]] = {
    # Whether cells are in order is known by the making of each network. Two cells are always accepted.
    "2 cells that see all": (wide((5,), 22), pixels(8, 22), True),
    "3 cells that see all": (wide((5,), 19), pixels(12, 19), True),
    "3 cells, mirrored": (Changed(lambda x: x.flip(3)), pixels(12), False),
    "4 cells that see all": (wide((7,), 0), pixels(16), True),
    "4 cells, mirrored": (Changed(lambda x: x.flip(3)), pixels(16), False),
    "5 cells, shuffled": (Changed(shuffled), pixels(20), False),
    "6 cells that see much": (wide((5, 5, 3), 2), pixels(24, 2), True),
    "6 cells, shuffled": (Changed(shuffled), pixels(24), False),
    "9 cells that see much": (wide((7, 7), 0), pixels(36), True),
    "12 cells, shuffled": (Changed(shuffled), pixels(48), False),
    "thin border": (Thin().eval(), pixels(64), True),
    "2 cells, mirrored": (Changed(lambda x: x.flip(3)), pixels(8), True),
}


def is_right(module: Any, name: str) -> bool:
    net, image, _ = CASES[name]
    with mock.patch.object(fullgrad, "readings", module.readings):
        return module.misplaced(image, lambda images: _maps(net, images)) is None


@pytest.mark.parametrize("name", CASES)
def test_networks_whose_order_is_known(name: str) -> None:
    assert is_right(bias_places, name) is CASES[name][2]


@pytest.mark.parametrize(
    ("right", "wrong", "name"),
    [
        ("NO_ORDER, TOO_FEW, FEW = 2, 4, 7", "NO_ORDER, TOO_FEW, FEW = 1, 4, 7", "2 cells that see all"),
        ("NO_ORDER, TOO_FEW, FEW = 2, 4, 7", "NO_ORDER, TOO_FEW, FEW = 3, 4, 7", "3 cells, mirrored"),
        ("NO_ORDER, TOO_FEW, FEW = 2, 4, 7", "NO_ORDER, TOO_FEW, FEW = 2, 3, 7", "4 cells that see all"),
        ("NO_ORDER, TOO_FEW, FEW = 2, 4, 7", "NO_ORDER, TOO_FEW, FEW = 2, 5, 7", "5 cells, shuffled"),
        ("NO_ORDER, TOO_FEW, FEW = 2, 4, 7", "NO_ORDER, TOO_FEW, FEW = 2, 15, 7", "12 cells, shuffled"),
        ("NO_ORDER, TOO_FEW, FEW = 2, 4, 7", "NO_ORDER, TOO_FEW, FEW = 2, 4, 5", "6 cells that see much"),
        ("ORDERED_AT_ALL = 0.2", "ORDERED_AT_ALL = 0.0", "6 cells, shuffled"),
        ("ORDERED_AT_ALL = 0.2", "ORDERED_AT_ALL = 0.3", "6 cells that see much"),
        ("BETTER = 0.5", "BETTER = 1.0", "4 cells, mirrored"),
        ("BETTER = 0.5", "BETTER = 0.3", "3 cells that see all"),
        ("COARSE = 14", "COARSE = 1000", "thin border"),
        ("share = order_of(place, known=0.0) if share > 0 else share", "pass", "9 cells that see much"),
        ("order_of(place, 0.0, change)", "order_of(place, 1.0, change)", "3 cells that see all"),
    ],
)
def test_each_constant_decides_an_answer(right: str, wrong: str, name: str) -> None:
    assert is_right(mutated(MODULE, right, wrong), name) is not CASES[name][2]


def test_one_image_is_enough_for_cells_that_are_known_to_be_in_order() -> None:
    """The order of 12 cells is 0.87 by one image: enough, though not so sure that it would end the search by itself."""
    net, image, passed = wide((7,), 0), pixels(48), []
    net.register_forward_pre_hook(lambda module, args: passed.append(len(args[0])))

    def count(known: float) -> tuple[float, int]:
        passed.clear()
        share = order(image, (12, 12), lambda images: _maps(net, images)[-2], known)
        assert share is not None
        return share, sum(passed)

    (one, few), (all_of_them, many) = count(1.0), count(0.0)
    assert bias_places.EXPLAINED <= one < 0.9 < all_of_them
    assert few < many
    passed.clear()
    assert bias_places.misplaced(image, lambda images: _maps(net, images)) is None
    assert sum(passed) == 2 + few  # shared by all maps of the grid


@pytest.mark.parametrize("cls", [FullGrad, SmoothFullGrad])
@pytest.mark.parametrize("cells", [3, 4, 8])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(2),
        lambda x: x.flip(3),
        lambda x: x.flip(2, 3),
        lambda x: x.roll(x.shape[2] // 2, 2),
        lambda x: x.roll(x.shape[3] // 2, 3),
        lambda x: x.roll((x.shape[2] // 2, x.shape[3] // 2), (2, 3)),
        lambda x: x.transpose(2, 3),
    ],
)
def test_cells_in_another_arrangement_are_refused(cls: Any, cells: int, change: Change) -> None:
    image = pixels(4 * cells)
    assert cls(Changed(lambda x: x).eval()).attribute(image, 1).std() > 0
    with pytest.raises(NotApplicable, match="does not keep the positions of the image"):
        cls(Changed(change).eval()).attribute(image, 1)


class Last(nn.Module):
    """Channels last: a linear layer or, as `first`, the same as a convolution of 1 × 1; or a constant that is added."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells, self.linear, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8), nn.Linear(8, 3)
        self.kind, self.shift = kind, torch.rand(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cells(x).relu()
        if self.kind == "first":
            x = torch.conv2d(x, self.linear.weight[:, :, None, None], self.linear.bias)
        else:
            x = x.permute(0, 2, 3, 1)
            x = self.linear(x) if self.kind == "linear" else x + self.shift
            x = x.permute(0, 3, 1, 2)
        y: Tensor = self.head(x.relu().mean(dim=(2, 3)))
        return y


@pytest.mark.parametrize("cells", [2, 3, 4, 8])
def test_cells_of_a_linear_layer_with_channels_last(cells: int) -> None:
    images = torch.rand(2, 3, 4 * cells, 4 * cells, generator=torch.Generator().manual_seed(0))
    for cls in (FullGrad, SmoothFullGrad):
        found, expected = (cls(Last(kind).eval()).attribute(images, 1) for kind in ("linear", "first"))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cells", [3, 4, 8])
def test_constants_added_to_cells_with_channels_last_are_refused(cells: int) -> None:
    with pytest.raises(NotApplicable, match="does not keep the positions of the image"):
        FullGrad(Last("added").eval()).attribute(pixels(4 * cells), 1)


class Normalised(nn.Module):
    """Normalises images, of which channels may come last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.net, self.last, self.mean = Changed(lambda x: x), last, torch.tensor([0.4, 0.5, 0.6])

    def forward(self, x: Tensor) -> Tensor:
        shifted = (x.permute(0, 2, 3, 1) - self.mean).permute(0, 3, 1, 2) if self.last else x - self.mean[:, None, None]
        y: Tensor = self.net(shifted)
        return y


def test_three_colours_that_come_last_are_not_taken_for_columns() -> None:
    FullGrad(Normalised(last=False).eval()).attribute(pixels(32), 1)
    with pytest.raises(NotApplicable, match="does not keep the positions of the image"):
        FullGrad(Normalised(last=True).eval()).attribute(pixels(32), 1)
