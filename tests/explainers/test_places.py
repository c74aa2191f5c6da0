"""Cells in order are told from cells that are not, by networks whose right order is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from interp_models import EXPLAINERS, NotApplicable
from interp_models.explainers.layers import target_layer
from interp_models.explainers.places import EXPLAINED, order


def body(size: int, padding: int = 1) -> nn.Sequential:
    """Convolutions that halve the resolution twice; a cell sees about three cells around it."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for given, made, stride in ((3, 16, 2), (16, 16, 1), (16, 16, 2), (16, 16, 1)):
        layers += [nn.Conv2d(given, made, 3, stride, padding, bias=False), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def picture(*size: int) -> Tensor:
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))


def within_quarters(cells: Tensor) -> Tensor:
    """Exchange cells at random within each quarter of the map."""
    h, w = cells.shape[2:]
    places, generator = torch.arange(h * w).view(h, w), torch.Generator().manual_seed(0)
    for rows in (slice(h // 2), slice(h // 2, h)):
        for columns in (slice(w // 2), slice(w // 2, w)):
            part = places[rows, columns].flatten()
            places[rows, columns] = part[torch.randperm(len(part), generator=generator)].view(h // 2, w // 2)
    return cells.flatten(2)[:, :, places.flatten()].view_as(cells)


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda a: a,
    "half of the channels off": lambda a: torch.cat([a[:, :8], 0 * a[:, 8:]], dim=1),
    "most cells off": lambda a: a * (torch.arange(a.shape[3]) % 2 == 0),
    "negative": lambda a: -3 * a,
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda a: a.flip(2, 3),
    "mirrored": lambda a: a.flip(3),
    "transposed": lambda a: a.transpose(2, 3),
    "moved by a quarter": lambda a: a.roll(a.shape[3] // 4, dims=3),
    "moved on by one": lambda a: a.flatten(2).roll(1, dims=2).view_as(a),
    "exchanged within quarters": within_quarters,
    "without places": lambda a: a.mean(dim=(2, 3), keepdim=True).expand_as(a),
    "sorted": lambda a: a.flatten(2).sort(dim=2).values.view_as(a),
}


@pytest.mark.parametrize("size", [32, 64])
def test_cells_in_order_are_told_from_others(size: int) -> None:
    network, image = body(size), picture(size, size)
    grid = (size // 4, size // 4)
    for name, change in RIGHT.items():
        share = order(image, grid, lambda x, change=change: change(network(x)).detach())  # type: ignore[misc]
        assert share is not None and share >= EXPLAINED, f"{name}: {share}"  # noqa: PT018
    for name, change in WRONG.items():
        share = order(image, grid, lambda x, change=change: change(network(x)).detach())  # type: ignore[misc]
        assert share is not None and share < EXPLAINED, f"{name}: {share}"  # noqa: PT018


def test_what_a_network_does_with_its_images_is_seen() -> None:
    network, image = body(64), picture(64, 64)

    def share(before: Callable[[Tensor], Tensor]) -> float:
        grid = tuple(network(before(image)).shape[2:])
        found = order(image, (grid[0], grid[1]), lambda x: network(before(x)).detach())
        assert found is not None
        return found

    assert share(lambda x: x) >= EXPLAINED
    assert share(lambda x: nn.functional.interpolate(x, size=48, mode="bilinear")) >= EXPLAINED
    assert share(lambda x: x[..., 16:48, 16:48]) == 0  # what lies outside does not count
    assert share(lambda x: x[..., :48, :48]) == 0
    assert share(lambda x: x[..., 2:62, 2:62]) == 0  # cells of four pixels: less than a cell at each side
    assert share(lambda x: x[..., :62, :62]) >= EXPLAINED  # as strides leave out
    assert share(lambda x: nn.functional.pad(x, (32, 0, 0, 0))) < EXPLAINED
    assert share(lambda x: x.roll(16, dims=3)) < EXPLAINED
    assert share(lambda x: x.transpose(2, 3)) < EXPLAINED


def test_a_map_that_never_changes_tells_nothing() -> None:
    assert order(picture(32, 32), (8, 8), lambda x: torch.zeros(len(x), 4, 8, 8)) is None


def test_networks_without_padding_are_read() -> None:
    """LeNet: its outer cells lie half a cell further inside than a map that covers the whole image says."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 4)).eval()
    assert target_layer(model, None, picture(28, 28)).name == "5"


class Tokens(nn.Module):
    """Tokens of patches between others, mixed by one layer of attention; the mean of all is read."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.others = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.randn(before + after, 32))
        self.before = before
        self.block = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        others = self.others.expand(len(x), -1, -1)
        tokens = torch.cat([others[:, : self.before], patches, others[:, self.before :]], dim=1)
        made: Tensor = self.head(self.norm(self.block(tokens)).mean(dim=1))
        return made


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (0, 1), (4, 1), (0, 3)])
def test_tokens_before_and_after_the_patches_are_told_apart(before: int, after: int) -> None:
    form = target_layer(Tokens(before, after).eval(), None, picture(64, 64)).form
    assert (form.kind, form.grid, form.prefix, form.suffix) == ("tokens", (8, 8), before, after)


class Queries(nn.Module):
    """A number of learned queries that pool the cells by attention: no map, however many there are."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.queries, self.norm = nn.Parameter(torch.randn(count, 16)), nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)
        self.body = body(32)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.body(x).flatten(2).transpose(1, 2)
        weights = (self.queries @ cells.transpose(1, 2) * 4).softmax(dim=-1)
        made: Tensor = self.head(self.norm(weights @ cells).mean(dim=1))
        return made


@pytest.mark.parametrize("count", [4, 9, 16])
def test_learned_queries_are_no_cells(count: int) -> None:
    for seed in range(5):
        assert target_layer(Queries(count, seed).eval(), None, picture(32, 32)).name == "body"


def test_a_network_whose_batch_is_split_is_read_or_refused() -> None:
    class Split(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.body, self.head, self.size = body(32), nn.Linear(16, 3), size

        def forward(self, x: Tensor) -> Tensor:
            parts = [self.body(part) for part in x.split(self.size)]
            return self.head(torch.cat(parts).mean(dim=(2, 3)))  # type: ignore[no-any-return]

    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = EXPLAINERS.build("activation_map", model=Split(100).eval()).attribute(images, 1)
    assert float(expected.std()) > 0
    for size in (1, 4):
        with pytest.raises(NotApplicable, match=r"Split has no layer that all|gives \d rows for \d images"):
            EXPLAINERS.build("activation_map", model=Split(size).eval()).attribute(images, 1)
