"""What every metric of maps promises, as functions that fail with AssertionError."""

from collections.abc import Callable

import torch
from torch import Tensor

from interp_models.core.scoring import ScoreFn
from interp_models.core.truth import Truth, in_boxes
from interp_models.metrics.base import MapMetric
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import to_pixels
from tests.contract.explainers import near, refused

Make = Callable[..., MapMetric]


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


def truth_of(images: Tensor) -> Truth:
    """Boxes, a mask and parts that depend on the pixels of an image, so that they follow it into any batch."""
    height, width = images.shape[-2:]
    x, y = (images[:, channel, 0, 0].float() * side / 2 for channel, side in ((0, width), (1, height)))
    boxes = torch.stack([x, y, x + width / 3, y + height / 3], dim=1)
    mask = in_boxes(boxes[:, None], (height, width))[:, 0]
    parts = torch.stack([torch.stack([x + 2, y + 2], dim=1), torch.stack([x + 5, y + 3], dim=1)], dim=1)
    return Truth(boxes, mask, mask[:, None], parts)


class OfPatches:
    """Scores of a model that sees only some patches: the others count as black, as in a mean over pixels.

    Args:
        score: maps images to probabilities.
        grid: rows and columns of patches.
    """

    def __init__(self, score: ScoreFn, grid: tuple[int, int]) -> None:
        self.score, self.grid = score, grid

    def __call__(self, images: Tensor, kept: Tensor) -> Tensor:
        """Probabilities (B, K) of the kept patches (B, k)."""
        seen = images.new_zeros(len(images), self.grid[0] * self.grid[1]).scatter(1, kept, 1).view(-1, *self.grid)
        return self.score(images * to_pixels(seen, (images.shape[-2], images.shape[-1]))[:, None])


def case(
    images: Tensor,
    maps: Tensor,
    target: Tensor | int,
    score: ScoreFn = score_fn,
    clean: Tensor | None = None,
    truth: Truth | None = None,
) -> Case:
    """A case with everything that a metric can need."""

    def explain(others: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(others.float().square().mean(dim=1), (3, 4))

    correct = (images[:, 2, 0, 0] > 0.15).float()

    def logits(x: Tensor) -> Tensor:
        return score(x).float().clamp(min=1e-30).log()  # infinite logits are refused

    own = OfPatches(score, (3, 4))
    return Case(images, maps, target, score, clean, truth or truth_of(images), correct, explain, logits, own)


def settled(metric: MapMetric, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """One value per image, from what `score` returned."""
    return {key: metric.over_images(key, value) for key, value in values.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    """Values by key are equal, NaN included; else an AssertionError says what is not."""
    assert a.keys() == b.keys(), f"{what}: keys {list(a)} and {list(b)}"
    for key in a:
        near(a[key], b[key], f"{what}: {key}", rtol=1e-5, atol=1e-6, equal_nan=True)


def check_keys(make: Make) -> None:
    """The class lists its keys, and gives just them, per image and as means over what is defined."""
    metric = make()
    images, maps, target = data()
    values = settled(metric, metric.score(case(images, maps, target)))
    cls = type(metric)
    assert tuple(values) == cls.keys, f"it lists {cls.keys} and gives {tuple(values)}"
    assert cls.keys == tuple(cls.higher_is_better_by_key) == tuple(cls.legend), (
        "keys, higher_is_better_by_key and legend name different keys"
    )
    assert set(cls.aliases.values()) <= set(cls.keys), "an alias stands for no key"
    assert not set(cls.aliases) & set(cls.keys), "an alias is a key"
    assert all(value.shape == (len(images),) for value in values.values()), "not one value per image"
    metric.update(case(images, maps, target))
    equal(metric.per_image(), values, "per_image")
    equal(metric.compute(), {key: value.nanmean() for key, value in values.items()}, "the mean")


def check_batch(make: Make) -> None:
    """A value belongs to its image alone: any batch size, any order, any number of images per pass."""
    images, maps, target = data()
    together = make().score(case(images, maps, target))
    singles = [make().score(case(images[i : i + 1], maps[i : i + 1], target[i : i + 1])) for i in range(len(images))]
    equal({key: torch.cat([single[key] for single in singles]) for key in together}, together, "one by one")
    equal(make(batch=3).score(case(images, maps, target)), together, "three images a pass")
    back = make().score(case(images.flip(0), maps.flip(0), target.flip(0)))
    equal({key: value.flip(0) for key, value in back.items()}, together, "in another order")


def check_split(make: Make) -> None:
    """Updates add up, reset forgets, and the known score of the clean image changes nothing."""
    images, maps, target = data()
    metric = make()
    metric.update(case(images[:2], maps[:2], target[:2]))
    clean = score_fn(images[2:]).gather(1, target[2:, None])[:, 0]
    metric.update(case(images[2:], maps[2:], target[2:], clean=clean))
    equal(metric.per_image(), settled(metric, make().score(case(images, maps, target))), "two updates")
    metric.reset()
    metric.update(case(images[:1], maps[:1], target[:1]))
    equal(metric.per_image(), settled(metric, make().score(case(images[:1], maps[:1], target[:1]))), "after a reset")


def check_undefined(make: Make) -> None:
    """A constant map has no value, and does not poison the others' mean; a class of score 0 never gives infinity."""
    images, maps, target = data()
    values = make().score(case(images, maps, target))
    maps[1] = 0.25
    metric = make()
    metric.update(case(images, maps, target))
    keep = torch.tensor([True, False, True, True, True])
    for key, value in make().score(case(images, maps, target)).items():
        assert bool(torch.isnan(value[1]).all()), f"{key} of a constant map is {value[1]}"
        near(value[keep], values[key][keep], f"{key} beside a constant map", equal_nan=True)
        assert bool(torch.isnan(metric.per_image()[key][1])), f"{key} of a constant map is defined"
        assert bool(torch.isfinite(metric.compute()[key])), f"the mean of {key} is not finite"
    zero = make().score(
        case(images, maps, torch.full_like(target, 3), lambda x: torch.cat([score_fn(x), torch.zeros(len(x), 1)], 1))
    )
    assert not any(bool(torch.isinf(value).any()) for value in zero.values()), "infinite for a class of score 0"


def check_scale(make: Make) -> None:
    """Only the order and the proportions of a map count: a · map + b with a > 0 has the same values."""
    images, maps, target = data()
    maps = (256 * maps).round() / 256  # so that nothing is rounded, and equal pixels stay equal
    scaled = make().score(case(images, 7.5 * maps - 3, target))
    equal(scaled, make().score(case(images, maps, target)), "a scaled map")


SHOWN_ELSEWHERE = ("ad_box", "ag_box", "ai_box", "ad_outside", "ag_outside", "ai_outside")
"""Keys of parts of the map, which need images of their own to tell directions; see `test_box_split_has_directions`."""


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
    if make().family != "faithfulness":
        maps = maps.relu()
    # The form of a map says nothing about the evidence: a simple map is compared with a complex one.
    other = torch.rand(4, 3, 4) if make().family == "form" else -maps
    target = torch.zeros(4, dtype=torch.long)
    box = torch.tensor([6.0, 6.0, 18.0, 18.0])  # what a map of coarse cells can mark
    box = box.expand(4, 4)
    mask = in_boxes(box[:, None], (24, 32))[:, 0]
    truth = Truth(box, mask, mask[:, None], torch.full((4, 1, 2), 12.0))
    right, wrong = (make().score(case(images, m, target, score, truth=truth)) for m in (maps, other))
    for key, higher in make().higher_is_better_by_key.items():
        a, b = (float(make().over_images(key, values[key]).mean()) for values in (right, wrong))
        assert a != b or key in SHOWN_ELSEWHERE, f"{key} does not tell the evidence from its negative"
        assert a == b or (a > b) == higher, f"{key}: {a} for the evidence, {b} for its negative"


def check_precision(make: Make) -> None:
    """Images and scores may be of any precision, and not of the same."""
    images, maps, target = data()
    plain = make().score(case(images, maps, target))
    high = make().score(case(images.double(), maps, target, lambda x: score_fn(x).float()))
    for key in plain:  # a correlation of small differences of scores feels their last digits
        near(high[key], plain[key], f"{key} of images in float64", rtol=0, atol=2e-4, equal_nan=True)
    low = make().score(case(images, maps, target, lambda x: score_fn(x).bfloat16()))
    assert low.keys() == plain.keys(), "scores in bfloat16 give other keys"


def check_refusals(make: Make) -> None:
    """Maps of the wrong shape or with NaN, and classes that do not exist, end in one clear line."""
    images, maps, target = data()
    for wrong in (maps[:2], maps[:, None], maps[0]):
        shape = "maps must be (batch, rows, columns) for 5 images"
        refused(lambda wrong=wrong: make().score(case(images, wrong, target)), shape, f"maps {tuple(wrong.shape)}")
    scored = "score_fn" in make().needs
    for clean in (None, torch.full((5,), 0.5)) if scored else ():
        line = "target 9 is out of range: the model has classes 0 to 2"
        refused(lambda clean=clean: make().score(case(images, maps, 9, clean=clean)), line, "class 9")
    maps[0, 0, 0] = torch.nan
    refused(lambda: make().score(case(images, maps, target)), "a map holds NaN", "a map with NaN")
    refused(lambda: make(preset="gomez"), "unknown preset 'gomez'; did you mean 'gomez2023'", "an unknown preset")


CHECKS = (
    check_keys, check_batch, check_split, check_undefined, check_scale, check_direction, check_precision,
    check_refusals,
)  # fmt: skip
