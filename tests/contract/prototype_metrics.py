"""What every prototype metric promises, as functions that fail with AssertionError."""

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from interp_models.metrics.prototype_base import Found, PrototypeMetric
from tests.contract.explainers import near
from tests.data.make_cub import PARTS

Make = Callable[..., PrototypeMetric]


class Fake:
    """A model that knows its maps by heart: every pixel of an image is the image's number, unless there is noise.

    Args:
        maps: (N, P, h, w) by the number of the image.
        classes: (P, K) bool.
        moved: the maps of images with noise; None are those without.
        weights: (K, P).
        prototypes: (P, ...).
    """

    def __init__(
        self,
        maps: Tensor,
        classes: Tensor,
        moved: Tensor | None = None,
        weights: Tensor | None = None,
        prototypes: Tensor | None = None,
    ) -> None:
        self.maps, self.prototype_classes, self.prototype_weights = maps, classes, weights
        self.moved = maps if moved is None else moved
        p = len(classes)
        self.prototypes = torch.arange(2.0 * p).view(p, 2, 1, 1) if prototypes is None else prototypes
        self.seen: list[Tensor] = []
        """The batches of images that it was given."""

    def __call__(self, images: Tensor) -> Any:
        self.seen.append(images)
        numbers = images.mean(dim=(1, 2, 3)).round().long()
        noisy = (images != images[:, :1, :1, :1]).any(dim=3).any(dim=2).any(dim=1)
        maps = torch.where(noisy[:, None, None, None], self.moved[numbers], self.maps[numbers])
        logits = maps.flatten(2).amax(dim=2) @ self.prototype_classes.float()
        return SimpleNamespace(maps=maps + 0 * images.sum(dim=(1, 2, 3)).view(-1, 1, 1, 1), logits=logits)


class Data:
    """Images that `Fake` knows, with their ground truth.

    Args:
        label: (N,) int64.
        parts: (N, J, 2).
        visible: (N, J) bool; None are all.
        size: of the images.
    """

    def __init__(self, label: Any, parts: Tensor, visible: Tensor | None = None, size: tuple[int, int] = (56, 56)):
        self.label, self.parts, self.size = torch.as_tensor(label), parts, size
        self.visible = torch.ones(parts.shape[:2], dtype=torch.bool) if visible is None else visible

    def batch(self, model: Fake, numbers: Iterable[int]) -> Found:
        """Some of the images, with what the model finds there."""
        number = torch.tensor(list(numbers))
        images = number.float().view(-1, 1, 1, 1).expand(-1, 3, *self.size)
        maps = model(images).maps
        mask = torch.rand(len(self.label), *self.size, generator=torch.Generator().manual_seed(5)) < 0.3
        return Found(images, maps, self.label[number], number, self.parts[number], self.visible[number], mask[number])


def judge(
    metric: PrototypeMetric, model: Fake, data: Data, batch: int = 4, numbers: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Values by key after batches of the images in an order."""
    numbers = range(len(data.label)) if numbers is None else numbers
    for start in range(0, len(numbers), batch):
        metric.update(model, data.batch(model, numbers[start : start + batch]))
    return metric.per_prototype()


def case(seed: int = 0, n: int = 24, grid: tuple[int, int] = (7, 7), size: tuple[int, int] = (56, 56)) -> tuple:
    """A model with 8 prototypes, of which 2 are removed, and images of 3 classes; maps and parts are random.

    Half of the parts lie on whole pixels. Prototypes 0 and 3 point at a part in most images, the others in some or
    none. Most images are equally similar to the odd ones, and have several places where they are so.
    """
    g = torch.Generator().manual_seed(seed)
    classes = torch.zeros(8, 3, dtype=torch.bool)
    for prototype, labels in enumerate([[0], [], [0, 2], [1], [1, 2], [], [2], [2]]):
        classes[prototype, labels] = True
    label = torch.arange(n) * 3 // n
    side = torch.tensor([size[1], size[0]])
    parts = torch.rand(n, len(PARTS), 2, generator=g) * side
    parts[:, ::2] = parts[:, ::2].round()
    visible = torch.rand(n, len(PARTS), generator=g) < 0.7
    maps = torch.rand(n, 8, *grid, generator=g)
    maps[torch.arange(n) % 3 > 0] = maps[torch.arange(n) % 3 > 0].clamp(max=0.9)
    for number in range(n):
        for prototype, most in ((0, 1.0), (2, 0.5), (3, 0.8), (6, 0.5)):
            if torch.rand((), generator=g) < most:
                x, y = (parts[number, prototype] / side * torch.tensor([grid[1], grid[0]])).long().tolist()
                maps[number, prototype, min(y, grid[0] - 1), min(x, grid[1] - 1)] += 1
    moved = torch.where((torch.rand(n, 8, 1, 1, generator=g) < 0.5), maps.flip(3), maps)
    weights = torch.rand(3, 8, generator=g) * (torch.rand(3, 8, generator=g) < 0.6)
    weights[0] = 0.5
    prototypes = torch.rand(8, 4, 2, 1, generator=g)
    prototypes[3] = prototypes[0]
    return Fake(maps, classes, moved, weights, prototypes), Data(label, parts, visible, size)


def equal(a: dict[str, Tensor], b: dict[str, Tensor], what: str = "values") -> None:
    """Values by key are the same to the last digit, NaN included; else an AssertionError says what is not."""
    assert a.keys() == b.keys(), f"{what}: keys {list(a)} and {list(b)}"
    for key in a:
        near(a[key], b[key], f"{what}: {key}", rtol=0, atol=0, equal_nan=True)


def check_keys(make: Make) -> None:
    """The class describes just the keys that it gives, a value per prototype, and means over what is defined."""
    model, data = case()
    metric = make(model, PARTS)
    values = judge(metric, model, data)
    cls = type(metric)
    assert tuple(values) == cls.keys, f"it lists {cls.keys} and gives {tuple(values)}"
    assert cls.keys == tuple(cls.higher_is_better_by_key) == tuple(cls.legend), (
        "keys, higher_is_better_by_key and legend name different keys"
    )
    assert cls.split in ("train", "test") or (cls.split is None and not cls.needs)
    assert all(text.endswith(".") for text in cls.legend.values())
    for key, value in values.items():
        assert value.shape == (8,)
        known = value[~value.isnan()]
        assert len(known)
        assert not cls.percent or bool(((known >= 0) & (known <= 1)).all()), f"{key} is no share"
    equal(metric.compute(), {key: value.nanmean() for key, value in values.items()})
    equal(metric.of_all_ranks(), values)


def check_batch(make: Make) -> None:
    """A value does not depend on how images come in batches, nor in which order."""
    model, data = case()
    expected = judge(make(model, PARTS), model, data)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist()
    for batch, numbers in ((1, None), (24, None), (5, range(23, -1, -1)), (7, order)):
        equal(judge(make(model, PARTS), model, data, batch, numbers), expected, "in other batches")


OF_SOME = ("plc", "pac", "prc", "ac", "distinctiveness")
"""Keys without a value for some prototypes that are in use: those never attacked, or alone in their class."""


def check_removed(make: Make) -> None:
    """Prototypes of no class have no value, or 0 where the class says so; all others have one."""
    model, data = case()
    data.visible[:, 0] = True
    removed = ~model.prototype_classes.any(dim=1)
    metric = make(model, PARTS)
    zero = metric.zero_if_removed
    assert set(zero) <= set(metric.keys), "zero_if_removed names a key that it does not give"
    for key, value in judge(metric, model, data).items():
        if key in zero:
            assert bool((value[removed] == 0).all()), f"{key} of removed prototypes is not 0"
            assert not bool(value.isnan().any()), f"{key} is undefined"
        elif key in OF_SOME:
            assert bool(value[removed].isnan().all()), f"{key} of removed prototypes is defined"
        else:
            assert torch.equal(value.isnan(), removed), f"{key} is undefined elsewhere than for removed prototypes"
    model.prototype_classes[:] = False
    metric = make(model, PARTS)
    for key, value in judge(metric, model, data).items():
        assert bool((value == 0).all() if key in zero else value.isnan().all()), f"{key} of a model without prototypes"
    assert {key for key, mean in metric.compute().items() if not mean.isnan()} <= set(zero)


def check_reset(make: Make) -> None:
    """What was seen before a reset is forgotten, and a metric without images has no value that needs some."""
    (model, data), (_, other) = case(), case(1)
    metric = make(model, PARTS)
    judge(metric, model, data)
    metric.compute()
    metric.reset()
    empty = all(bool(value.isnan().all()) for value in metric.per_prototype().values())
    assert "parts" not in metric.needs or empty, "after a reset there are values without images"
    few = range(3, 17, 2)
    equal(judge(metric, model, other, 4, few), judge(make(model, PARTS), model, other, 4, few), "after a reset")
    equal(metric.compute(), {key: value.nanmean() for key, value in metric.per_prototype().items()})


def check_direction(make: Make) -> None:
    """Prototypes that point at one part are better than those that point anywhere, where it is a matter of parts."""
    model, data = case()
    at = (data.parts[:, 1] // 8).clamp(max=6).long()
    pointing = torch.zeros_like(model.maps)
    for number, (x, y) in enumerate(at.tolist()):
        pointing[number, :, y, x] = 1
    data.visible[:] = True
    good, bad = Fake(pointing, model.prototype_classes), Fake(model.maps, model.prototype_classes, model.moved)
    metric, other = make(good, PARTS), make(bad, PARTS)
    judge(metric, good, data)
    judge(other, bad, data)
    for key, higher in metric.higher_is_better_by_key.items():
        a, b = float(metric.compute()[key]), float(other.compute()[key])
        assert "parts" not in metric.needs or (a > b if higher else a < b), f"{key}: {a} for pointing, {b} for any"


CHECKS = (check_keys, check_batch, check_removed, check_reset, check_direction)
