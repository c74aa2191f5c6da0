"""What every faithfulness metric promises, as functions that fail with AssertionError."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from interp_models.metrics.base import FaithfulnessMetric

Make = Callable[..., FaithfulnessMetric]


def score_fn(images: Tensor) -> Tensor:
    """Probabilities of three classes that depend on all pixels, each in its own way."""
    height, width = images.shape[-2:]
    y = torch.linspace(-1, 1, height).view(1, 1, -1, 1)
    x = torch.linspace(-1, 1, width).view(1, 1, 1, -1)
    pooled = [(images * w).mean(dim=(1, 2, 3)) for w in (1 + y, 1 + x, torch.ones(()))]
    return (8 * torch.stack(pooled, dim=1)).softmax(dim=1)


def data(n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Images, maps and targets."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(n, 3, 24, 32, generator=generator)
    maps = torch.rand(n, 3, 4, generator=generator) - 0.3
    return images, maps, torch.randint(0, 3, (n,), generator=generator)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Values by key are equal, NaN included."""
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6, equal_nan=True)


def check_keys(make: Make) -> None:
    """The class lists its keys, and gives just them, per image and as means over what is defined."""
    metric = make()
    images, maps, target = data()
    values = metric.score(score_fn, images, maps, target)
    assert tuple(values) == type(metric).keys == tuple(metric.better)
    assert all(value.shape == (len(images),) for value in values.values())
    metric.update(score_fn, images, maps, target)
    equal(metric.per_image(), values)
    equal(metric.compute(), {key: value.nanmean() for key, value in values.items()})


def check_batch(make: Make) -> None:
    """A value belongs to its image alone: any batch size, any order, any number of images per pass."""
    images, maps, target = data()
    together = make().score(score_fn, images, maps, target)
    singles = [
        make().score(score_fn, images[i : i + 1], maps[i : i + 1], target[i : i + 1]) for i in range(len(images))
    ]
    equal({key: torch.cat([single[key] for single in singles]) for key in together}, together)
    equal(make(batch=3).score(score_fn, images, maps, target), together)
    back = make().score(score_fn, images.flip(0), maps.flip(0), target.flip(0))
    equal({key: value.flip(0) for key, value in back.items()}, together)


def check_split(make: Make) -> None:
    """Updates add up, reset forgets, and the known score of the clean image changes nothing."""
    images, maps, target = data()
    metric = make()
    metric.update(score_fn, images[:2], maps[:2], target[:2])
    clean = score_fn(images[2:]).gather(1, target[2:, None])[:, 0]
    metric.update(score_fn, images[2:], maps[2:], target[2:], clean)
    equal(metric.per_image(), make().score(score_fn, images, maps, target))
    metric.reset()
    metric.update(score_fn, images[:1], maps[:1], target[:1])
    equal(metric.per_image(), make().score(score_fn, images[:1], maps[:1], target[:1]))


def check_undefined(make: Make) -> None:
    """A constant map has no value, and does not poison the others' mean; a class of score 0 never gives infinity."""
    images, maps, target = data()
    values = make().score(score_fn, images, maps, target)
    maps[1] = 0.25
    metric = make()
    metric.update(score_fn, images, maps, target)
    keep = torch.tensor([True, False, True, True, True])
    for key, value in metric.per_image().items():
        assert bool(torch.isnan(value[1])), f"{key} of a constant map is {value[1]}"
        torch.testing.assert_close(value[keep], values[key][keep], equal_nan=True)
        assert bool(torch.isfinite(metric.compute()[key]))
    zero = make().score(
        lambda x: torch.cat([score_fn(x), torch.zeros(len(x), 1)], 1), images, maps, torch.full_like(target, 3)
    )
    assert not any(bool(torch.isinf(value).any()) for value in zero.values())


def check_scale(make: Make) -> None:
    """Only the order and the proportions of a map count: a · map + b with a > 0 has the same values."""
    images, maps, target = data()
    equal(make().score(score_fn, images, 7.5 * maps - 3, target), make().score(score_fn, images, maps, target))


def check_direction(make: Make) -> None:
    """A map that shows the evidence beats its negative, in the direction that the class declares."""
    torch.manual_seed(0)
    images = 0.1 + 0.1 * torch.rand(4, 3, 24, 32)
    images[:, :, 8:16, 8:16] = 1.0  # the evidence
    images[:, :, 16:, 24:] = 0.9  # a distractor, evidence of the other class

    def score(x: Tensor) -> Tensor:
        a, b = x[:, :, 8:16, 8:16].mean(dim=(1, 2, 3)), x[:, :, 16:, 24:].mean(dim=(1, 2, 3))
        return (3 * torch.stack([a, b], dim=1)).softmax(dim=1)

    maps = 0.01 * torch.rand(4, 3, 4)
    maps[:, 1, 1] = 1.0
    maps[:, 2, 3] = -1.0
    target = torch.zeros(4, dtype=torch.long)
    right, wrong = make().score(score, images, maps, target), make().score(score, images, -maps, target)
    for key, higher in make().better.items():
        a, b = float(right[key].mean()), float(wrong[key].mean())
        assert a != b
        assert (a > b) == higher, f"{key}: {a} for the evidence, {b} for its negative"


def check_precision(make: Make) -> None:
    """Images and scores may be of any precision, and not of the same."""
    images, maps, target = data()
    plain = make().score(score_fn, images, maps, target)
    high = make().score(lambda x: score_fn(x).float(), images.double(), maps, target)
    for key in plain:  # a correlation of small differences of scores feels their last digits
        torch.testing.assert_close(high[key], plain[key], rtol=0, atol=2e-4, equal_nan=True)
    low = make().score(lambda x: score_fn(x).bfloat16(), images, maps, target)
    assert low.keys() == plain.keys()


def check_refusals(make: Make) -> None:
    """Maps of the wrong shape or with NaN, and classes that do not exist, end in one clear line."""
    images, maps, target = data()
    for wrong in (maps[:2], maps[:, None], maps[0]):
        with pytest.raises(ValueError, match=r"maps must be \(batch, rows, columns\) for 5 images"):
            make().score(score_fn, images, wrong, target)
    for clean in (None, torch.full((5,), 0.5)):
        with pytest.raises(ValueError, match="target 9 is out of range: the model has classes 0 to 2"):
            make().score(score_fn, images, maps, 9, clean)
    maps[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="a map holds NaN"):
        make().score(score_fn, images, maps, target)
    with pytest.raises(ValueError, match="unknown preset 'gomez'; did you mean 'gomez2023'"):
        make(preset="gomez")


CHECKS = (
    check_keys, check_batch, check_split, check_undefined, check_scale, check_direction, check_precision,
    check_refusals,
)  # fmt: skip
